"""What another runtime makes of a checkpoint: run in a process of its own, so that nothing is shared.

    python -m lmpress.eval.runtimes NAME CHECKPOINT FOLDER

reads `FOLDER/request.json` (token ids, names of layers), and writes beside it `outputs.safetensors` (`logits` and
`hidden.N`, the hidden states after block N, if the runtime shows them), a file `weights/LAYER.safetensors` per layer
with the weight that is really served, and `versions.json`.

The served weight of a linear layer is read off by sending the identity through it: x = I gives W^T, whatever the kernel.
Layers that round their inputs are asked not to, if they can be.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..calibrate.model import safetensors_io
from ..calibrate.model.architecture import find_blocks
from ..compress.formats.export import gguf_model
from ..compress.load import load
from ..errors import CompressError, UsageError
from ..kernels.modules.linear import PackedLinear
from .engines.llamacpp import llamacpp_outputs
from .engines.mlx import mlx_outputs
from .engines.onnx_runtimes import onnxruntime_outputs, openvino_outputs

REQUEST, OUTPUTS, WEIGHTS, VERSIONS = "request.json", "outputs.safetensors", "weights", "versions.json"


@dataclass(frozen=True)
class Runtime:
    """A runtime and how close it must come.

    run      (checkpoint, ids, layers, folder) writes what the module's docstring says
    steps    largest difference of a served weight, in steps of its grid: what the runtime's number type costs, below half
             a step, so that no wrong code passes
    logits   largest difference of a logit, in standard deviations of the reference's logits
    top1     smallest share of equal most likely tokens
    cache    whether keys and values are rounded to the scales that a checkpoint has of them, those of a prompt too
    reach    a dynamic symmetric scale of inputs is `absmax / (largest code + reach)`
    """

    run: Callable[[Path, Tensor, list[str], Path], None]
    packages: tuple[str, ...]
    steps: float
    logits: float
    top1: float
    reach: float = 0.0
    cache: bool = False


def run_model(model: PreTrainedModel, ids: Tensor, layers: list[str], folder: Path) -> None:
    """Write what a torch model computes: logits, hidden states after every block, served weights."""
    _write_outputs(model, ids, folder)
    _write_weights(model, layers, folder, model.dtype)


@torch.inference_mode()
def _write_outputs(model: PreTrainedModel, ids: Tensor, folder: Path) -> None:
    _, blocks = find_blocks(model)
    outputs: dict[str, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[f"hidden.{index}"] = (output if isinstance(output, Tensor) else output[0]).float()

        return hook

    handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
    outputs["logits"] = model(ids).logits.float()
    for handle in handles:
        handle.remove()
    safetensors_io.write(folder / OUTPUTS, outputs)


@torch.inference_mode()
def _write_weights(model: PreTrainedModel, layers: list[str], folder: Path, dtype: torch.dtype) -> None:
    for name in layers:
        expert = _expert_weight(model, name)
        write_weight(folder, name, served_weight(model.get_submodule(name), dtype) if expert is None else expert)


def _expert_weight(model: PreTrainedModel, name: str) -> Tensor | None:
    """The weight of an expert that the model keeps with all others of its layer in one parameter; None for other layers."""
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", name)
    if match is None or isinstance(model.get_submodule(match[1]), nn.ModuleList):
        return None
    experts: Any = model.get_submodule(match[1])
    if match[3] == "down":
        return experts.down_proj[int(match[2])].float()
    return experts.gate_up_proj[int(match[2])].float().chunk(2)[match[3] == "up"].contiguous()


def served_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` that `linear` multiplies by, without its bias, or the rows of a table, as float32."""
    if hasattr(linear, "num_embeddings"):
        return linear(torch.arange(int(linear.num_embeddings))).float()  # type: ignore[arg-type]
    width = int(getattr(linear, "in_features", 0) or getattr(linear, "nx", 0))
    zero, identity = torch.zeros(1, width, dtype=dtype), torch.eye(width, dtype=dtype)
    if isinstance(linear, PackedLinear):  # the product alone: what is in front of it rounds inputs
        return linear.product(identity).float().T.contiguous()
    if hasattr(linear, "quantization_scheme"):  # compressed-tensors looks here whether to round inputs
        setattr(linear, "quantization_enabled", False)  # noqa: B010 no attribute that torch knows of
    return (linear(identity) - linear(zero)).float().T.contiguous()


def write_weight(folder: Path, name: str, weight: Tensor) -> None:
    """Store the served weight of layer `name`."""
    (folder / WEIGHTS).mkdir(exist_ok=True)
    safetensors_io.write(folder / WEIGHTS / f"{name}.safetensors", {"weight": weight})


def _transformers(checkpoint: Path, ids: Tensor, layers: list[str], folder: Path) -> None:
    model = _pretrained(checkpoint)
    if _by_bitsandbytes(model):
        raise CompressError("bitsandbytes computes in 16 bits and is judged so", "use --runtime bitsandbytes")
    run_model(model, ids, layers, folder)


def _bitsandbytes(checkpoint: Path, ids: Tensor, layers: list[str], folder: Path) -> None:
    """Weights in training mode and float32, the only way to see them exactly; and first, since serving rearranges them."""
    model = _pretrained(checkpoint)
    if not _by_bitsandbytes(model):
        raise CompressError(f"{checkpoint} is not in a format of bitsandbytes")
    computing = [module for module in model.modules() if hasattr(module, "compute_dtype")]
    dtypes = [module.compute_dtype for module in computing]
    model.train()
    for module in computing:
        module.set_compute_type, module.compute_dtype = (lambda x: None), torch.float32  # type: ignore[assignment]
    _write_weights(model, layers, folder, torch.float32)
    for module, dtype in zip(computing, dtypes, strict=True):
        module.compute_dtype = dtype  # type: ignore[assignment]
    _write_outputs(model.eval(), ids, folder)


def _by_bitsandbytes(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _gguf(checkpoint: Path, ids: Tensor, layers: list[str], folder: Path) -> None:
    run_model(_pretrained(checkpoint, gguf_file=gguf_model.FILE), ids, layers, folder)


def _lmpress(checkpoint: Path, ids: Tensor, layers: list[str], folder: Path) -> None:
    run_model(load(checkpoint), ids, layers, folder)


Outputs = Callable[[Path, Tensor, list[str], Callable[[str, Tensor], None]], dict[str, Tensor]]


def _written(outputs: Outputs) -> Callable[[Path, Tensor, list[str], Path], None]:
    """`run` of a runtime that is not a torch model, from the function that gives its outputs."""

    def run(checkpoint: Path, ids: Tensor, layers: list[str], folder: Path) -> None:
        found = outputs(checkpoint, ids, layers, lambda name, weight: write_weight(folder, name, weight))
        safetensors_io.write(folder / OUTPUTS, found)

    return run


def _pretrained(checkpoint: Path, gguf_file: str | None = None) -> PreTrainedModel:
    """As transformers loads it, in float32. Raises `CompressError` if it only warns of missing tensors."""
    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **options
    )
    model, info = loaded
    wrong = [
        f"{problem} {', '.join(map(str, sorted(info[problem])[:3]))}" for problem in LOADING_PROBLEMS if info[problem]
    ]
    if wrong:
        raise CompressError("; ".join(wrong))
    return model.eval()


LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")
HALF = 0.5  # compressed-tensors divides by 127.5, half a step beyond the largest code
RUNTIMES: dict[str, Runtime] = {
    "transformers": Runtime(
        _transformers,
        ("transformers", "torch", "compressed-tensors", "gptqmodel"),
        steps=0.3,
        logits=2e-2,
        top1=0.95,
        reach=HALF,
        cache=True,
    ),
    "bitsandbytes": Runtime(_bitsandbytes, ("transformers", "torch", "bitsandbytes"), steps=1e-3, logits=0.3, top1=0.9),
    "gguf-transformers": Runtime(_gguf, ("transformers", "torch", "gguf"), steps=0.3, logits=2e-2, top1=0.95),
    # Products of inputs in 8 bits: logits of correct files were off by 0.05 to 0.15.
    "llama.cpp": Runtime(_written(llamacpp_outputs), ("llama-cpp-python", "gguf"), steps=0.3, logits=0.25, top1=0.9),
    "onnxruntime": Runtime(_written(onnxruntime_outputs), ("onnxruntime", "onnx"), steps=1e-3, logits=1e-3, top1=0.99),
    "openvino": Runtime(_written(openvino_outputs), ("openvino", "onnx"), steps=1e-3, logits=1e-3, top1=0.99),
    "mlx": Runtime(_written(mlx_outputs), ("mlx", "mlx-lm"), steps=0.3, logits=2e-2, top1=0.95),
    "lmpress": Runtime(_lmpress, ("lmpress", "torch"), steps=1e-3, logits=1e-4, top1=0.99),
}


def runtime(name: str) -> Runtime:
    """The runtime called `name`. Raises `UsageError` if there is none."""
    if name not in RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}", f"runtimes: {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def main(name: str, checkpoint: str, folder: str) -> None:
    """Answer the request in `folder`."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    request = json.loads((Path(folder) / REQUEST).read_text(encoding="utf-8"))
    asked = runtime(name)
    asked.run(Path(checkpoint), torch.tensor(request["ids"]), request["layers"], Path(folder))
    found = {package: version(package) for package in asked.packages if package in _installed()}
    (Path(folder) / VERSIONS).write_text(json.dumps(found))


def _installed() -> set[str]:
    from importlib.metadata import distributions

    return {str(each.metadata["Name"]).lower().replace("_", "-") for each in distributions()}


if __name__ == "__main__":
    main(*sys.argv[1:])

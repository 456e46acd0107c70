"""What another runtime makes of a checkpoint, told by itself: run in a process of its own, so that nothing is shared.

    python -m lmpress.eval.runtimes NAME CHECKPOINT FOLDER

reads `FOLDER/request.json` (token ids, names of layers), and writes beside it `outputs.safetensors` (`logits` and
`hidden.N`, the hidden states after block N, where the runtime shows them), a file `weights/LAYER.safetensors` per layer
with the weight that is really served, and `versions.json`.

The served weight of a linear layer is read off by sending the identity through it: x = I gives W^T, whatever the kernel.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..calibrate.discovery import find_blocks
from ..compress.errors import CompressError, UsageError
from ..compress.formats import shards
from ..compress.formats.export import gguf_model
from ..compress.formats.export import onnx as onnx_model
from ..compress.formats.load import load

REQUEST, OUTPUTS, WEIGHTS, VERSIONS = "request.json", "outputs.safetensors", "weights", "versions.json"


@dataclass(frozen=True)
class Runtime:
    """A runtime and how close it must come.

    run      (checkpoint, ids, layers, folder) writes what the module's docstring says
    steps    largest difference of a served weight, in steps of its grid: what the runtime's number type costs, below half
             a step, so that no wrong code passes
    logits   largest difference of a logit, in standard deviations of the reference's logits
    top1     smallest share of equal most likely tokens
    """

    run: Callable[[Path, Tensor, list[str], Path], None]
    packages: tuple[str, ...]
    steps: float
    logits: float
    top1: float


def run_model(model: PreTrainedModel, ids: Tensor, layers: list[str], folder: Path) -> None:
    """Write what a torch model computes: logits, hidden states after every block, served weights."""
    _, blocks = find_blocks(model)
    outputs: dict[str, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[f"hidden.{index}"] = (output if isinstance(output, Tensor) else output[0]).float()

        return hook

    handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
    with torch.inference_mode():
        outputs["logits"] = model(ids).logits.float()
        for handle in handles:
            handle.remove()
        shards.write(folder / OUTPUTS, outputs)
        for name in layers:
            linear = model.get_submodule(name)
            write_weight(folder, name, served_weight(linear, model.dtype))


def served_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` that `linear` multiplies by, without its bias, or the rows of a table, as float32."""
    if hasattr(linear, "num_embeddings"):
        return linear(torch.arange(int(linear.num_embeddings))).float()  # type: ignore[arg-type]
    width = int(getattr(linear, "in_features", 0) or getattr(linear, "nx", 0))
    zero, identity = torch.zeros(1, width, dtype=dtype), torch.eye(width, dtype=dtype)
    return (linear(identity) - linear(zero)).float().T.contiguous()


def write_weight(folder: Path, name: str, weight: Tensor) -> None:
    """Store the served weight of layer `name`."""
    (folder / WEIGHTS).mkdir(exist_ok=True)
    shards.write(folder / WEIGHTS / f"{name}.safetensors", {"weight": weight})


def _transformers(checkpoint: Path, ids: Tensor, layers: list[str], folder: Path) -> None:
    run_model(_pretrained(checkpoint), ids, layers, folder)


def _gguf(checkpoint: Path, ids: Tensor, layers: list[str], folder: Path) -> None:
    run_model(_pretrained(checkpoint, gguf_file=gguf_model.FILE), ids, layers, folder)


def _lmpress(checkpoint: Path, ids: Tensor, layers: list[str], folder: Path) -> None:
    run_model(load(checkpoint), ids, layers, folder)


def _onnxruntime(checkpoint: Path, ids: Tensor, layers: list[str], folder: Path) -> None:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(checkpoint))

    def run(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return {name: torch.from_numpy(found) for name, found in zip(names, session.run(names, inputs), strict=True)}

    model = onnx.load(checkpoint / onnx_model.FILE, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    floats = onnx.TensorProto.FLOAT
    for name in layers:  # a graph of the one node, fed with the identity, or of a table with all its rows' numbers
        node = nodes[name]
        used = [stored[part] for part in node.input if part in stored]
        entry, table = next(part for part in node.input if part not in stored), node.op_type == "Gather"
        kinds = {entry: onnx.TensorProto.INT64 if table else floats, node.output[0]: floats}
        ends = [onnx.helper.make_tensor_value_info(end, kind, None) for end, kind in kinds.items()]
        alone = onnx.helper.make_graph([node], name, ends[:1], ends[1:], used)
        width = next((a.i for a in node.attribute if a.name == "K"), used[0].dims[0])
        one = onnx.helper.make_model(alone, opset_imports=model.opset_import, ir_version=model.ir_version)
        fed = torch.arange(width) if table else torch.eye(width)
        found = run(one, {entry: fed.numpy()})[node.output[0]]
        write_weight(folder, name, found if table else found.T.contiguous())
    hidden = [output for node in model.graph.node for output in node.output if output.startswith("hidden.")]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, floats, None) for name in hidden)
    shards.write(folder / OUTPUTS, run(model, {"input_ids": ids.numpy()}))


def _pretrained(checkpoint: Path, gguf_file: str | None = None) -> PreTrainedModel:
    """As transformers loads it, in float32. Raises `CompressError` where it only warns of missing tensors."""
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
RUNTIMES: dict[str, Runtime] = {
    "transformers": Runtime(
        _transformers, ("transformers", "torch", "compressed-tensors", "gptqmodel"), steps=0.3, logits=2e-2, top1=0.95
    ),
    "gguf-transformers": Runtime(_gguf, ("transformers", "torch", "gguf"), steps=0.3, logits=2e-2, top1=0.95),
    "onnxruntime": Runtime(_onnxruntime, ("onnxruntime", "onnx"), steps=1e-3, logits=1e-3, top1=0.99),
    "lmpress": Runtime(_lmpress, ("lmpress", "torch"), steps=1e-3, logits=1e-4, top1=0.99),
}


def runtime(name: str) -> Runtime:
    """The runtime called `name`. Raises `UsageError` where there is none."""
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

    return {str(each.metadata["Name"]).lower() for each in distributions()}


if __name__ == "__main__":
    main(*sys.argv[1:])

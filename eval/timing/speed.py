"""Tokens per second of whole models, in one run: prefill of a prompt, and decoding one token at a time.

Models take turns, in a new order in each round; results are medians; the first round is a warm-up and does not count. A packed
checkpoint is timed with exact kernels and with int8 inputs, unless its format or a forced kernel allows only one of them. Peak
memory is that of a separate process that loads the model and does the same once.
"""

import json
import random
import re
import resource
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...calibrate.model.skeleton import context_length
from ...compress.load import load
from ...compress.report.progress import Event, Observer, silent
from ...errors import CompressError, UsageError
from ...kernels.modules.fused_decode import blocks_of
from ...kernels.modules.linear import PackedLinear, SpQRLinear, kernels_of
from ..processes import absolute, run_module
from .machine import clock

PROMPT, ANSWER, ROUNDS = 128, 32, 5
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`, in bytes


@dataclass(frozen=True)
class Speed:
    """Speed and memory of one model: `prefill` and `decode` in tokens per second, the ratios are those to the base's rates.

    kernels       number of layers per kernel (see `kernels_of`)
    blocks        number of blocks with fused single-token decoding, and without it (see `blocks_of`)
    weight_bytes  of all parameters and buffers
    peak_bytes    peak resident memory of a process that loads the model and decodes, Python and torch included
    """

    name: str
    kernels: dict[str, int]
    blocks: dict[str, int]
    prefill: float
    decode: float
    weight_bytes: int
    peak_bytes: int
    prefill_ratio: float | None = None
    decode_ratio: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def speed(
    model: str | Path,
    *,
    against: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernel: str | None = None,
    progress: Observer = silent,
) -> list[Speed]:
    """Time `model` and, if given, `against`, to which the ratios relate, on the same random tokens.

    Raises what `load` raises, and `UsageError` if the context is too short for the prompt and the decoded tokens.
    """
    options: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch."), "kernel": kernel}
    own, base_name = _names(model, against)
    arguments = {} if against is None else {base_name: {"path": str(against), **options, "kernel": None}}
    arguments[own] = {"path": str(model), **options}
    models = {name: _loaded(**each) for name, each in arguments.items()}
    if kernel is None and any(_takes_int8_inputs(module) for module in models[own].modules()):
        name = f"{own}, int8 inputs"
        arguments[name] = {"path": str(model), **options, "exact": False}
        models[name] = _loaded(**arguments[name])
    prompt = _prompt(list(models.values()))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    order = random.Random(0)  # noqa: S311
    for turn in range(ROUNDS + 1):
        for name in order.sample(list(models), len(models)):
            seconds[name].append(_decode(models[name], prompt))
        progress(Event("speed", block=turn + 1, blocks=ROUNDS + 1))
    found = [
        Speed(
            name=name,
            kernels=kernels_of(each),
            blocks=blocks_of(each),
            prefill=PROMPT / statistics.median(read for read, _ in seconds[name][1:]),
            decode=ANSWER / statistics.median(wrote for _, wrote in seconds[name][1:]),
            weight_bytes=_weight_bytes(each),
            peak_bytes=_peak_of_process(arguments[name]),
        )
        for name, each in models.items()
    ]
    if against is None:
        return found
    base = found[0]
    ratios = [(each.prefill / base.prefill, each.decode / base.decode) for each in found]
    return [replace(s, prefill_ratio=r, decode_ratio=d) for s, (r, d) in zip(found, ratios, strict=True)]


def peak(path: str, device: str, dtype: str, kernel: str | None, exact: bool = True) -> int:
    """Load the model at `path`, run prefill and decoding once; the peak resident memory of this process, in bytes.

    On Linux `ru_maxrss` includes the memory of the parent process before `exec`, so `VmHWM` of /proc is read first.
    """
    model = _loaded(path, device, dtype, kernel, exact)
    _decode(model, _prompt([model]))
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(own[1]) * 1024 if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT


def _names(model: str | Path, against: str | Path | None) -> tuple[str, str]:
    """The last parts of both paths, or the whole paths if these are the same."""
    names = (Path(model).resolve().name, Path(against or "").resolve().name)
    return (
        names
        if names[0] != names[1]
        else (str(model), f"{against}, base" if str(model) == str(against) else str(against))
    )


def _loaded(path: str, device: str, dtype: str, kernel: str | None, exact: bool = True) -> PreTrainedModel:
    return load(path, device, getattr(torch, dtype), exact=exact, kernel=kernel)


def _takes_int8_inputs(module: torch.nn.Module) -> bool:
    """Whether the layer has a kernel for int8 inputs in addition to the exact one."""
    return type(module) in (PackedLinear, SpQRLinear)


def _prompt(models: list[PreTrainedModel]) -> Tensor:
    """Token ids int64 `[1, PROMPT]` below the vocabulary size of every model."""
    configs = [model.config.get_text_config() for model in models]
    contexts = [length for model in models if (length := context_length(model.config)) is not None]
    if contexts and min(contexts) < PROMPT + ANSWER:
        raise UsageError(f"--speed needs a context of {PROMPT + ANSWER} tokens, the model has {min(contexts)}")
    vocabulary = min(config.vocab_size for config in configs)
    return torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _decode(model: PreTrainedModel, prompt: Tensor) -> tuple[float, float]:
    """Seconds of the prefill of `prompt`, and of decoding ANSWER tokens after it."""
    now, prompt = clock(), prompt.to(model.device)
    start = now()
    out = model(input_ids=prompt, use_cache=True)
    _finish(model)
    read = now()
    for _ in range(ANSWER):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    _finish(model)
    return read - start, now() - read


def _finish(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _weight_bytes(model: PreTrainedModel) -> int:
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


def _peak_of_process(arguments: dict[str, Any]) -> int:
    given = json.dumps(arguments | {"path": absolute(arguments["path"])})
    done = run_module(__name__, [given], environment={"OMP_NUM_THREADS": str(torch.get_num_threads())})
    if done.returncode:
        raise CompressError(f"memory of {arguments['path']} could not be measured: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":  # the process that `_peak_of_process` starts
    print(peak(**json.loads(sys.argv[1])))

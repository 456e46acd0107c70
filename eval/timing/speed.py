"""Tokens per second of whole models, in one run: reading a prompt, and answering a token at a time.

Models take turns, in a new order in each round; medians; the first round warms up and does not count. A packed checkpoint is
timed with exact kernels and with int8 inputs, unless its format or a forced kernel leaves no choice. Peak memory is that of a
process of its own that loads the model and does the same once.
"""

import json
import os
import random
import re
import resource
import statistics
import subprocess
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
from .machine import clock

PROMPT, ANSWER, ROUNDS = 128, 32, 5
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`, in bytes
CHILD = "import sys, json; from lmpress.eval.timing.speed import peak; print(peak(**json.loads(sys.argv[1])))"


@dataclass(frozen=True)
class Speed:
    """What one model reached: tokens per second, how many times as fast as the base that is, and bytes.

    kernels       how many layers each kernel serves (see `kernels_of`)
    blocks        how many blocks answer single tokens in two calls, and how many do not (see `blocks_of`)
    weight_bytes  of all parameters and buffers
    peak_bytes    resident memory of a process that loads the model and answers, Python and torch included
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
    """Time `model`, and `against` beside it: its ratios are those to `against`. Random tokens; the same for all.

    Raises what `load` raises, and `UsageError` where the context is too short for a prompt and an answer.
    """
    options: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch."), "kernel": kernel}
    own, base_name = _names(model, against)
    contestants = {} if against is None else {base_name: {"path": str(against), **options, "kernel": None}}
    contestants[own] = {"path": str(model), **options}
    models = {name: _loaded(**each) for name, each in contestants.items()}
    if kernel is None and any(_has_a_choice(module) for module in models[own].modules()):
        name = f"{own}, int8 inputs"
        contestants[name] = {"path": str(model), **options, "exact": False}
        models[name] = _loaded(**contestants[name])
    prompt = _prompt(list(models.values()))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    order = random.Random(0)  # noqa: S311
    for turn in range(ROUNDS + 1):
        for name in order.sample(list(models), len(models)):
            seconds[name].append(_answer(models[name], prompt))
        progress(Event("speed", block=turn + 1, blocks=ROUNDS + 1))
    found = [
        Speed(
            name=name,
            kernels=kernels_of(each),
            blocks=blocks_of(each),
            prefill=PROMPT / statistics.median(read for read, _ in seconds[name][1:]),
            decode=ANSWER / statistics.median(wrote for _, wrote in seconds[name][1:]),
            weight_bytes=_weight_bytes(each),
            peak_bytes=_peak_elsewhere(contestants[name]),
        )
        for name, each in models.items()
    ]
    if against is None:
        return found
    base = found[0]
    ratios = [(each.prefill / base.prefill, each.decode / base.decode) for each in found]
    return [replace(s, prefill_ratio=r, decode_ratio=d) for s, (r, d) in zip(found, ratios, strict=True)]


def peak(path: str, device: str, dtype: str, kernel: str | None, exact: bool = True) -> int:
    """Load the model at `path`, let it read and answer once; the largest resident memory of this process, in bytes.

    Linux counts in `ru_maxrss` what the process was before it became this program, so its own account is asked first.
    """
    model = _loaded(path, device, dtype, kernel, exact)
    _answer(model, _prompt([model]))
    status = Path("/proc/self/status")
    own = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(own[1]) * 1024 if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT


def _names(model: str | Path, against: str | Path | None) -> tuple[str, str]:
    """The last parts of both paths, or all of them where these are the same."""
    names = (Path(model).resolve().name, Path(against or "").resolve().name)
    return (
        names
        if names[0] != names[1]
        else (str(model), f"{against}, base" if str(model) == str(against) else str(against))
    )


def _loaded(path: str, device: str, dtype: str, kernel: str | None, exact: bool = True) -> PreTrainedModel:
    return load(path, device, getattr(torch, dtype), exact=exact, kernel=kernel)


def _has_a_choice(module: torch.nn.Module) -> bool:
    """Whether inputs may become int8 where they were not."""
    return type(module) in (PackedLinear, SpQRLinear)


def _prompt(models: list[PreTrainedModel]) -> Tensor:
    """Token ids int64 `[1, PROMPT]` that all models know."""
    configs = [model.config.get_text_config() for model in models]
    contexts = [length for model in models if (length := context_length(model.config)) is not None]
    if contexts and min(contexts) < PROMPT + ANSWER:
        raise UsageError(f"--speed reads {PROMPT} tokens and writes {ANSWER}; the context is {min(contexts)}")
    vocabulary = min(config.vocab_size for config in configs)
    return torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _answer(model: PreTrainedModel, prompt: Tensor) -> tuple[float, float]:
    """Seconds to read `prompt`, and to write ANSWER tokens after it."""
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


def _peak_elsewhere(arguments: dict[str, Any]) -> int:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", CHILD, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise CompressError(f"memory of {arguments['path']} could not be measured: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])

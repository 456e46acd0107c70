"""Proof that another runtime serves a checkpoint as it was meant: weight by weight, then logits, then the block at fault."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibrate.rows import context_length
from ..compress.errors import UsageError
from ..compress.export import export
from ..compress.formats import shards
from ..compress.formats.checkpoint import Checkpoint
from ..compress.formats.load import load
from ..compress.tensor import BlockTensor, Compressed, CompressedTensor
from . import runtimes
from .runtimes import OUTPUTS, REQUEST, VERSIONS, WEIGHTS, Runtime, run_model

ROWS, LENGTH = 2, 64


@dataclass(frozen=True)
class Finding:
    """What one runtime made of the checkpoint.

    `worst_layer` is the layer whose served weight is farthest off, by `steps` steps of its grid, and `wrong_layers` are
    all that are too far. `logits` is in standard deviations of the reference's logits, `kl` in nats per token,
    `block` the first block whose output is too far off. Figures are None where the runtime failed or does not show them;
    `error` is its own last word then.
    """

    runtime: str
    versions: dict[str, str]
    ok: bool = False
    error: str | None = None
    steps: float | None = None
    worst_layer: str | None = None
    wrong_layers: tuple[str, ...] = ()
    logits: float | None = None
    kl: float | None = None
    top1: float | None = None
    block: int | None = None


@dataclass(frozen=True)
class Verification:
    """The findings on `checkpoint`, held against the dequantized weights of `against`."""

    checkpoint: str
    against: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every runtime passed."""
        return all(finding.ok for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ok": self.ok}


def verify(
    checkpoint: str | Path, *, against: str | Path | None = None, runtime: Sequence[str] = ("transformers",)
) -> Verification:
    """Load `checkpoint` in each runtime, in a process of its own, and compare.

    The reference is `against`: the checkpoint that this one was exported from, or any that `load` reads and that should be
    equal; by default the checkpoint itself as `load` reads it. Its dequantized weights are run in float32.
    Raises `UsageError` for unknown runtimes and where `against` has no quantized layers while the checkpoint has.
    """
    for name in runtime:
        runtimes.runtime(name)
    reference = Checkpoint.open(against or checkpoint)
    if not reference.layers:
        raise UsageError(
            f"{reference.source.path} is not quantized: it cannot tell what the codes of {checkpoint} should be",
            "give --against the checkpoint that it was exported from",
        )
    ids = _ids(reference)
    with tempfile.TemporaryDirectory(prefix="lmpress-verify-") as scratch:
        folder = Path(scratch)
        export(reference.source.path, folder / "dense", format="fp32")
        run_model(load(folder / "dense"), ids, [], folder)
        expected = shards.read(folder / OUTPUTS)
        findings = tuple(_find(name, Path(checkpoint), reference, ids, expected) for name in runtime)
    return Verification(str(checkpoint), str(reference.source.path), findings)


def _ids(reference: Checkpoint) -> Tensor:
    """The same random tokens every time."""
    config = reference.model.config
    length = min(LENGTH, context_length(config) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.get_text_config().vocab_size, (ROWS, length), generator=generator)


def _find(name: str, checkpoint: Path, reference: Checkpoint, ids: Tensor, expected: dict[str, Tensor]) -> Finding:
    limits = runtimes.runtime(name)
    with tempfile.TemporaryDirectory(prefix="lmpress-verify-") as scratch:
        folder = Path(scratch)
        request = {"ids": ids.tolist(), "layers": list(reference.layers)}
        (folder / REQUEST).write_text(json.dumps(request))
        command = [sys.executable, "-m", f"{__package__}.runtimes", name, str(checkpoint), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 our own module
        if done.returncode:
            return Finding(name, {}, error=_last_word(done))
        finding = Finding(name, json.loads((folder / VERSIONS).read_text()))
        finding = _compare_outputs(finding, limits, expected, shards.read(folder / OUTPUTS))
        finding = _compare_weights(finding, limits, reference, folder / WEIGHTS)
    assert finding.steps is not None and finding.logits is not None and finding.top1 is not None
    passed = not finding.wrong_layers and finding.logits <= limits.logits and finding.top1 >= limits.top1
    return replace(finding, ok=passed)


def _last_word(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"the process ended with {done.returncode}"


def _compare_weights(finding: Finding, limits: Runtime, reference: Checkpoint, folder: Path) -> Finding:
    """Every served weight against the dequantized one, layer by layer."""
    off = {}
    for name in reference.layers:
        tensor = reference.layer(name)
        served = shards.read(folder / f"{name}.safetensors")["weight"]
        off[name] = _steps(served, tensor)
    worst = max(off, key=lambda name: off[name])
    wrong = tuple(name for name, steps in off.items() if not steps <= limits.steps)
    return replace(finding, steps=off[worst], worst_layer=worst if off[worst] else None, wrong_layers=wrong)


def _steps(served: Tensor, tensor: Compressed) -> float:
    """The largest difference in steps of the grid; infinite for another shape or no numbers.

    The step of a layer without one grid (pruned, SpQR) is a 127th of its largest weight.
    """
    if served.shape != tensor.shape or not bool(served.isfinite().all()):
        return float("inf")
    expected = tensor.dequantize()
    if isinstance(tensor, CompressedTensor | BlockTensor):
        scale = tensor.scales() if isinstance(tensor, BlockTensor) else tensor.scale.float()
        step = scale.abs().repeat_interleave(tensor.shape[1] // scale.shape[1], dim=1)
    else:
        step = expected.abs().max() / 127
    return float(((served - expected).abs() / step).max())


def _compare_outputs(
    finding: Finding, limits: Runtime, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> Finding:
    logits, base = found["logits"], expected["logits"]
    p, q = F.log_softmax(base.double(), -1), F.log_softmax(logits.double(), -1)
    blocks = sorted(int(name.removeprefix("hidden.")) for name in expected if name.startswith("hidden."))
    seen = [index for index in blocks if f"hidden.{index}" in found]
    diverging = (i for i in seen if not _relative(found[f"hidden.{i}"], expected[f"hidden.{i}"]) <= limits.logits)
    return replace(
        finding,
        logits=_relative(logits, base),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        top1=float((logits.argmax(-1) == base.argmax(-1)).float().mean()),
        block=next(diverging, None),
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference in standard deviations of `expected`."""
    return float((found - expected).abs().max() / expected.std())

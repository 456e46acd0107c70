"""Proof that another runtime serves a checkpoint as it was meant: weight by weight, then logits, then the block at fault."""

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..calibrate.model import safetensors_io
from ..calibrate.model.skeleton import context_length
from ..compress.export import export
from ..compress.formats.checkpoint import Checkpoint
from ..compress.formats.kv_cache import is_scale, kv_scheme_from_config, stored_ranges
from ..compress.formats.source import open_source
from ..compress.load import load
from ..compress.output.record import check
from ..errors import UsageError
from ..kernels.activations import quantized_inputs
from ..kernels.cache.cache import serve_rounded
from ..kernels.tensor import Compressed
from ..recipes.scheme import kinds
from . import runtimes
from .processes import absolute, run_module
from .runtimes import OUTPUTS, REQUEST, VERSIONS, WEIGHTS, Runtime, run_model

ROWS, LENGTH = 2, 64
FLIPPED = 5e-2  # logits may be off by as much if inputs are rounded: values halfway between codes go either way


@dataclass(frozen=True)
class Divergence:
    """How far two models' predictions are apart: `logits` in standard deviations of the reference's, `kl` in nats per token,
    `top1` the share of equal most likely tokens."""

    logits: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Finding:
    """What one runtime made of the checkpoint.

    `worst_layer` is the layer whose served weight is farthest off, by `steps` steps of its grid (0: equal bit for bit), and
    `wrong_layers` are all that are too far. `outputs` compares with the dequantized checkpoint, `block` is the first that holds
    one or whose output is too far off; `original` compares with the dense model, if one was given. Figures are None if
    the runtime failed or does not show them; `error` is its own last word then.
    """

    runtime: str
    versions: dict[str, str]
    ok: bool = False
    error: str | None = None
    steps: float | None = None
    worst_layer: str | None = None
    wrong_layers: tuple[str, ...] = ()
    outputs: Divergence | None = None
    block: int | None = None
    original: Divergence | None = None


@dataclass(frozen=True)
class Verification:
    """The findings on `checkpoint`, held against the dequantized weights of `against`; `original` is a dense model whose
    divergence is reported too.

    `itself`: no other checkpoint was given to compare with, so that only integrity can be checked; `checked`: the weight files
    of `checkpoint` have the SHA-256 that its lmpress.json lists (False: there is no lmpress.json).
    """

    checkpoint: str
    against: str
    findings: tuple[Finding, ...]
    original: str | None = None
    itself: bool = False
    checked: bool = False

    @property
    def ok(self) -> bool:
        """Whether every runtime passed."""
        return all(finding.ok for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ok": self.ok}


def verify(
    checkpoint: str | Path,
    *,
    against: str | Path | None = None,
    runtime: Sequence[str] = ("transformers",),
    python: str | Path | None = None,
) -> Verification:
    """Load `checkpoint` in each runtime, in a process of its own, and compare.

    The reference is `against`: the checkpoint that this one was exported from, or any that `load` reads and that should be
    equal; by default the checkpoint itself as `load` reads it. Its dequantized weights are run in float32, inputs rounded as it
    says. If `against` is a dense model, the reference is the checkpoint itself, and how far the runtime is from the dense
    model is reported, not judged. `python` is the interpreter that runs the runtimes, by default this one; there must be
    all that lmpress imports, lmpress itself is taken from here.

    Raises `CompressError` if a weight file is damaged, `UsageError` for unknown runtimes, if `python` cannot be started, and if
    `against` is dense and the checkpoint is in a format that lmpress does not read.
    """
    for name in runtime:
        runtimes.runtime(name)
    checked = check(Path(checkpoint))
    reference, dense = _reference(checkpoint, against)
    ids = _ids(reference)
    with tempfile.TemporaryDirectory(prefix="lmpress-verify-") as scratch:
        original = None if dense is None else _run(load(dense.source.path), ids, Path(scratch))["logits"]
        models = _Models(Path(checkpoint), reference, ids, Path(scratch))
        findings = []
        for name in runtime:
            expected = models.outputs(runtimes.runtime(name))
            findings.append(_find(name, Path(checkpoint), reference, ids, expected, original, python))
    compared = None if dense is None else str(dense.source.path)
    return Verification(
        str(checkpoint), str(reference.source.path), tuple(findings), compared, against is None, checked
    )


def _reference(checkpoint: str | Path, against: str | Path | None) -> tuple[Checkpoint, Checkpoint | None]:
    """The checkpoint whose codes count, and the dense model that was given instead of one."""
    given = Checkpoint.open(against or checkpoint)
    if given.layers:
        return given, None
    remedy = "give --against the quantized checkpoint that it was exported from"
    try:
        own = None if against is None else Checkpoint.open(checkpoint)
    except UsageError as error:
        raise UsageError(
            f"{given.source.path} is dense: it cannot tell what the codes of {checkpoint} should be", remedy
        ) from error
    if own is None or not own.layers:
        raise UsageError(
            f"neither {checkpoint} nor the model that it is compared with is quantized: there are no codes to verify",
            f"{remedy}, or compare predictions with compress eval --against",
        )
    if own.model.config.get_text_config().vocab_size != given.model.config.get_text_config().vocab_size:
        raise UsageError(f"{given.source.path} has another vocabulary than {checkpoint}", remedy)
    return own, given


class _Models:
    """The reference with its weights dequantized, run once for every way of rounding its inputs and its cache."""

    def __init__(self, checkpoint: Path, reference: Checkpoint, ids: Tensor, scratch: Path) -> None:
        self._checkpoint, self._reference, self._ids, self._scratch = checkpoint, reference, ids, scratch
        self._found: dict[tuple[float, bool], dict[str, Tensor]] = {}

    def outputs(self, runtime: Runtime) -> dict[str, Tensor]:
        """Logits and hidden states as they should be in the runtime."""
        rounds = self._reference.reader is not None and self._reference.reader.inputs is not None
        caches = runtime.cache and _has_cache_scales(self._checkpoint, self._reference)
        key = runtime.reach if rounds else 0.0, caches
        if key not in self._found:
            dense = self._scratch / "dense"
            if not dense.exists():
                export(self._reference.source.path, dense, format="fp32")
            model = load(dense)
            layers = {name: self._reference.layer(name) for name in self._reference.layers} if rounds else {}
            if caches:
                scheme = kv_scheme_from_config(self._reference.source.config["quantization_config"])
                assert scheme is not None
                serve_rounded(model, scheme, stored_ranges(self._reference.source, model, scheme))
            with quantized_inputs(model, layers, key[0]):
                self._found[key] = _run(model, self._ids, self._scratch)
        return self._found[key]


def _has_cache_scales(checkpoint: Path, reference: Checkpoint) -> bool:
    """Whether the checkpoint has taken over the scales of the reference's cache, which not every format does."""
    return bool(reference.cache_scales) and any(map(is_scale, open_source(checkpoint).tensors))


def _run(model: PreTrainedModel, ids: Tensor, folder: Path) -> dict[str, Tensor]:
    run_model(model, ids, [], folder)
    return safetensors_io.read(folder / OUTPUTS)


def _ids(reference: Checkpoint) -> Tensor:
    """The same random tokens every time."""
    config = reference.model.config
    length = min(LENGTH, context_length(config) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.get_text_config().vocab_size, (ROWS, length), generator=generator)


def _find(
    name: str,
    checkpoint: Path,
    reference: Checkpoint,
    ids: Tensor,
    expected: dict[str, Tensor],
    original: Tensor | None,
    python: str | Path | None,
) -> Finding:
    limits = runtimes.runtime(name)
    inputs = reference.reader is not None and reference.reader.inputs is not None
    if inputs or (limits.cache and _has_cache_scales(checkpoint, reference)):
        limits = replace(limits, logits=max(limits.logits, FLIPPED), top1=min(limits.top1, 0.95))
    with tempfile.TemporaryDirectory(prefix="lmpress-verify-") as scratch:
        folder = Path(scratch)
        request = {"ids": ids.tolist(), "layers": list(reference.layers)}
        (folder / REQUEST).write_text(json.dumps(request))
        done = run_module(f"{__package__}.runtimes", [name, absolute(checkpoint), absolute(folder)], python)
        if done.returncode:
            return Finding(name, {}, error=_last_word(done))
        finding = Finding(name, json.loads((folder / VERSIONS).read_text()))
        found = safetensors_io.read(folder / OUTPUTS)
        finding = _compare_outputs(finding, limits, expected, found)
        finding = _compare_weights(finding, limits, reference, folder / WEIGHTS)
    if original is not None:
        finding = replace(finding, original=_divergence(found["logits"], original))
    assert finding.outputs is not None
    near = finding.outputs.logits <= limits.logits and finding.outputs.top1 >= limits.top1
    return replace(finding, ok=near and not finding.wrong_layers)


def _last_word(done: subprocess.CompletedProcess[str]) -> str:
    """The error that ended the process, and the tensor that transformers' report of what did not fit begins with."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if not lines:
        return f"the process ended with {done.returncode}"
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    report = next((f"; {line}" for line in lines if "MISMATCH" in line and "above report" in (raised or [""])[-1]), "")
    return ((raised or lines)[-1] + report)[:300]


def _compare_weights(finding: Finding, limits: Runtime, reference: Checkpoint, folder: Path) -> Finding:
    """Every served weight against the dequantized one, layer by layer."""
    off = {}
    for name in reference.layers:
        tensor = reference.layer(name)
        served = safetensors_io.read(folder / f"{name}.safetensors")["weight"]
        off[name] = _steps(served, tensor)
    worst = max(off, key=lambda name: off[name])
    wrong = tuple(name for name, steps in off.items() if not steps <= limits.steps)
    prefix, count = reference.blocks
    holding = [i for i in range(count) if any(name.startswith(f"{prefix}.{i}.") for name in wrong)]
    block = min([*holding, *([] if finding.block is None else [finding.block])], default=None)
    return replace(
        finding, steps=off[worst], worst_layer=worst if off[worst] else None, wrong_layers=wrong, block=block
    )


def _steps(served: Tensor, tensor: Compressed) -> float:
    """The largest difference in steps of the grid; infinite for another shape or no numbers."""
    if served.shape != tensor.shape or not bool(served.isfinite().all()):
        return float("inf")
    return float(((served - tensor.dequantize()).abs() / kinds.kind_of_tensor(tensor).step(tensor)).max())


def _compare_outputs(
    finding: Finding, limits: Runtime, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> Finding:
    blocks = sorted(int(name.removeprefix("hidden.")) for name in expected if name.startswith("hidden."))
    seen = [index for index in blocks if f"hidden.{index}" in found]
    diverging = (i for i in seen if not _relative(found[f"hidden.{i}"], expected[f"hidden.{i}"]) <= limits.logits)
    outputs = _divergence(found["logits"], expected["logits"])
    return replace(finding, outputs=outputs, block=next(diverging, None))


def _divergence(logits: Tensor, base: Tensor) -> Divergence:
    p, q = F.log_softmax(base.double(), -1), F.log_softmax(logits.double(), -1)
    return Divergence(
        logits=_relative(logits, base),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        top1=float((logits.argmax(-1) == base.argmax(-1)).float().mean()),
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference in standard deviations of `expected`."""
    return float((found - expected).abs().max() / expected.std())

"""Which kernel serves each layer of a packed checkpoint on this machine, before any weight is loaded."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..compress.formats.checkpoint import Checkpoint
from ..errors import UsageError
from ..kernels import dispatch
from ..kernels.kernel import STEPS, KernelSpec
from ..kernels.modules.quantized_inputs import entering
from ..recipes.scheme import QuantArgs, WeightArgs, kinds

UNFOLDED = "dequantized for every product"


@dataclass(frozen=True)
class Served:
    """`count` layers of the same name and storage, and the kernel that serves them.

    kernel      the name of the kernel, or `UNFOLDED` if there is none
    inputs      how inputs enter the product (see `KernelSpec`)
    passed_over the kernels that were tried before it, each with the reason why it cannot serve the layers
    """

    layer: str
    stored: str
    count: int
    kernel: str
    inputs: str
    passed_over: dict[str, str]


def served(
    path: str | Path,
    *,
    exact: bool = True,
    kernel: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Served]:
    """The kernels that serve the packed layers of the checkpoint at `path`; the keywords are those of `lmpress.load`.

    The list is empty if the checkpoint is dense, or quantized in a way that lmpress does not read. Raises `UsageError` if
    `kernel` cannot serve a layer on this machine.
    """
    try:
        checkpoint = Checkpoint.open(path)
    except UsageError:
        return []
    inputs = None if checkpoint.reader is None else checkpoint.reader.inputs
    found: Counter[tuple[str, str, KernelSpec | None]] = Counter()
    for name, args in checkpoint.layers.items():
        need = _need(args, checkpoint.shape(name)[1], inputs, exact, device, dtype)
        found[name.rpartition(".")[2], kinds.kind_of(args).label(args), need] += 1
    return [_choose(*key, count, kernel) for key, count in found.items()]


def _need(
    args: WeightArgs, width: int, inputs: QuantArgs | None, exact: bool, device: str, dtype: torch.dtype
) -> KernelSpec | None:
    """What a layer requires of its kernel; None if no kernel multiplies by such weights."""
    spec = kinds.kind_of(args).spec(args, width)
    if spec is None:
        return None
    spec = replace(spec, device=torch.device(device).type, dtype=dtype)
    if spec.values is not None:
        return spec
    activations, steps = entering(inputs) if inputs else ("float" if exact else "group", STEPS)
    return replace(spec, activations=activations, steps=steps)


def _choose(layer: str, label: str, need: KernelSpec | None, count: int, kernel: str | None) -> Served:
    if need is None:
        return Served(layer, label, count, UNFOLDED, "float", {})
    choice = dispatch.choose(need, kernel)
    reasons = {name: refusal.reason for name, refusal in choice.passed_over}
    return Served(layer, _stored(label, need), count, choice.kernel.name, need.activations, reasons)


def _stored(label: str, need: KernelSpec) -> str:
    return label if need.values is not None else f"{label}, groups of {need.group}"

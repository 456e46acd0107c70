"""Which kernel serves each layer of a packed checkpoint on this machine, before any weight is loaded."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..compress.formats.checkpoint import Checkpoint
from ..errors import UsageError
from ..kernels import dispatch
from ..kernels.kernel import STEPS, KernelSpec, Part
from ..kernels.modules.quantized_inputs import entering
from ..recipes.scheme import QuantArgs
from ..recipes.scheme.prune_args import PruneArgs

PARTS_OF: dict[str, tuple[Part, ...]] = {"two-level": ("levels", "residual"), "columns": ("columns",)}
UNFOLDED = "unfolded for every product"


@dataclass(frozen=True)
class Served:
    """`count` layers of one name and kind, and what serves them.

    kernel      the name of the kernel, or that there is none
    inputs      how inputs enter the product (see `KernelSpec`)
    passed_over the kernels that were tried before it, each with the reason why it does not serve
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
    """What serves the packed layers of the checkpoint at `path` under these arguments of `lmpress.load`.

    Nothing where it is dense, or quantized in a way that lmpress does not read. Raises `UsageError` for a `kernel` that
    cannot serve here.
    """
    try:
        checkpoint = Checkpoint.open(path)
    except UsageError:
        return []
    inputs = None if checkpoint.reader is None else checkpoint.reader.inputs
    kinds: Counter[tuple[str, KernelSpec | None]] = Counter()
    for name, args in checkpoint.layers.items():
        need = _need(args, checkpoint.shape(name)[1], inputs, exact, device, dtype)
        kinds[name.rpartition(".")[2], need] += 1
    return [_choose(layer, need, count, kernel) for (layer, need), count in kinds.items()]


def _need(
    args: QuantArgs | PruneArgs, width: int, inputs: QuantArgs | None, exact: bool, device: str, dtype: torch.dtype
) -> KernelSpec | None:
    """None for blocks of NF4 that reach over row ends."""
    if isinstance(args, PruneArgs):
        return KernelSpec.pruned(getattr(torch, str(args.dtype)), torch.device(device).type, dtype)
    kind = replace(args, rank=0).kind
    codebook = kind == "nf4"
    if codebook and width % (args.group_size or 1):
        return None
    activations, steps = entering(inputs) if inputs else ("float" if exact else "group", STEPS)
    where = torch.device(device).type
    group = (args.group_size or width) if codebook else args.columns_per_scale(width)
    return KernelSpec(
        args.bits,
        group,
        args.symmetric,
        codebook,
        activations,
        where,
        dtype,
        steps,
        parts=PARTS_OF.get(kind, ()),
    )


def _choose(layer: str, need: KernelSpec | None, count: int, kernel: str | None) -> Served:
    if need is None:
        return Served(layer, "nf4, blocks over row ends", count, UNFOLDED, "float", {})
    choice = dispatch.choose(need, kernel)
    reasons = {name: refusal.reason for name, refusal in choice.passed_over}
    return Served(layer, _stored(need), count, choice.kernel.name, need.activations, reasons)


def _stored(need: KernelSpec) -> str:
    if need.values is not None:
        return f"pruned {str(need.values).removeprefix('torch.')}"
    kind = "nf4" if need.codebook else f"int{need.bits} {'symmetric' if need.symmetric else 'asymmetric'}"
    return f"{kind}, groups of {need.group}"

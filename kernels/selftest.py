"""A kernel proves itself on this machine, once per need, before it serves: a small product against float64.

The inputs are those that break kernels: all codes at their largest and smallest, activations at the ends of int8 with equal
and with alternating signs (saturating sums), one outlier, ragged rows, columns and batch sizes. Silent saturation is no
theory: two int8 products that torch ships do it on machines without VNNI.
"""

import torch
from torch import Tensor

from ..compress.prune.args import PruneArgs
from ..compress.scheme import float_name
from ..compress.tensor import PrunedTensor
from .apart import prepare
from .kernel import CodedProduct, Kernel, Need, Product, PrunedProduct
from .reference import quantized
from .weight import PrunedWeight, Weight

ROWS, BATCH = 35, 13
PRUNED_WIDTH = 203  # no multiple of anything
FEW_COLUMNS, MOST_COLUMNS = 512, 1024  # wide enough for every way in which a kernel cuts a long group


def failure(kernel: Kernel, need: Need) -> str | None:
    """Why `kernel` may not serve `need` on this machine, or None where it passed. Raises `Unavailable` if it cannot run."""
    weight, x = extremes(need)
    product = prepare(kernel, weight, need)
    allowed = max(kernel.tolerance, 4 * torch.finfo(need.dtype).eps)
    for inputs in (x, x[-1:]):  # many rows and one: kernels part ways there
        error = relative_error(product(inputs), weight, inputs, need)
        if not error <= allowed:
            return f"its self-test failed: error {error:.1e} where {allowed:.0e} is allowed"
    if not _holds(product, weight):
        return "its self-test failed: its layout loses codes"
    return None


def _holds(product: Product, weight: Weight | PrunedWeight) -> bool:
    """Whether what was given can be had back."""
    if isinstance(weight, Weight):
        return isinstance(product, CodedProduct) and torch.equal(product.codes(), weight.codes)
    kept = product.weight if isinstance(product, PrunedProduct) else None
    return kept is not None and torch.equal(kept.mask, weight.mask) and torch.equal(kept.values, weight.values)


def relative_error(y: Tensor, weight: Weight | PrunedWeight, x: Tensor, need: Need) -> float:
    """The largest, over the rows of `x`, of the norm of what `y` lacks to the product in float64, relative to the product's."""
    expected = quantized(x.float(), need).double() @ weight.dequantize(torch.float64).T
    return float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def extremes(need: Need) -> tuple[Weight | PrunedWeight, Tensor]:
    """A weight with rows of extreme codes, or none and all of whose values are stored, and inputs with rows of extreme
    values, the rest random."""
    generator = torch.Generator().manual_seed(0)
    if need.values is not None:
        return _pruned(need.values, need.device, generator), _inputs(PRUNED_WIDTH, PRUNED_WIDTH, need, generator)
    group = min(need.group, MOST_COLUMNS)
    width = 3 * group if group <= FEW_COLUMNS else group
    device = need.device
    codes = torch.randint(0, 2**need.bits, (ROWS, width), generator=generator)
    codes[0], codes[1] = 0, 2**need.bits - 1
    codes[2, ::2], codes[2, 1::2] = 0, 2**need.bits - 1
    groups = -(-width // need.group)
    scale = (torch.rand(ROWS, groups, generator=generator) + 0.5) / (width * 2**need.bits)  # sums that fit float16
    zero = torch.randint(0, 2**need.bits, scale.shape, generator=generator)
    codebook = torch.linspace(-1, 1, 2**need.bits, device=device) ** 3 if need.codebook else None
    integers = None if need.symmetric or need.codebook else zero.to(device)
    weight = Weight(codes.to(device, torch.uint8), scale.to(device), integers, need.bits, need.group, codebook)
    return weight, _inputs(width, group, need, generator)


def _pruned(values: torch.dtype, device: str, generator: torch.Generator) -> PrunedWeight:
    dense = torch.randn(ROWS, PRUNED_WIDTH, generator=generator) / PRUNED_WIDTH
    pruned = torch.rand(dense.shape, generator=generator) < 0.5
    pruned[0], pruned[1] = True, False
    args = PruneArgs(dtype=float_name(values), storage="bitmask")
    kept = PrunedWeight.of(PrunedTensor.of(dense, pruned, args))
    return PrunedWeight(kept.mask.to(device), kept.values.to(device), kept.width)


def _inputs(width: int, group: int, need: Need, generator: torch.Generator) -> Tensor:
    x = torch.randn(BATCH, width, generator=generator)
    x[0] = 127
    x[1] = 127 * (1 - 2 * (torch.arange(width) % 2))
    x[2], x[2, ::group] = -127, 127
    x[3], x[3, width // 2] = 1, 1e4
    x[4] = 0
    x[4, -1] = 1
    return x.to(need.device, need.dtype)

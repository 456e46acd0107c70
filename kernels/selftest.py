"""A kernel proves itself on this machine, once per need, before it serves: a small product against float64.

The inputs are those that break kernels: all codes at their largest and smallest, activations at the ends of int8 with equal
and with alternating signs (saturating sums), one outlier, ragged rows, columns and batch sizes; and the weight has the parts
that the need names: scales of two levels, columns in 16 bits, a residual. Silent saturation is no theory: two int8 products
that torch ships do it on machines without VNNI.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..recipes.scheme import float_name
from ..recipes.scheme.prune_args import PruneArgs
from .kernel import CodedProduct, Kernel, KernelSpec, Product, PrunedProduct
from .outliers import prepare
from .reference import quantized
from .tensor import Bilevel, PrunedTensor
from .weight import Levels, PrunedWeight, SparseRows, Weight

ROWS, BATCH = 35, 13
PRUNED_WIDTH = 203  # no multiple of anything
FEW_COLUMNS, MOST_COLUMNS = 512, 1024  # wide enough for every way in which a kernel cuts a long group
LARGEST = 4.0  # a row's sum of weights, nearly: its products fit float16
KEPT, OUTLIER = 3, 50  # columns in 16 bits, and how much louder their inputs are
SCALES = (torch.float32, torch.float16)  # layouts part ways there
SHARE = 0.05  # of the weights that have an entry of the residual


def failure(kernel: Kernel, need: KernelSpec) -> str | None:
    """Why `kernel` may not serve `need` on this machine, or None where it passed. Raises `Unavailable` if it cannot run."""
    one_layout = need.values is not None or "levels" in need.parts
    for dtype in SCALES[:1] if one_layout else SCALES:
        if failed := _failure(kernel, need, *extremes(need, dtype)):
            return failed
    return None


def _failure(kernel: Kernel, need: KernelSpec, weight: Weight | PrunedWeight, x: Tensor) -> str | None:
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


def relative_error(y: Tensor, weight: Weight | PrunedWeight, x: Tensor, need: KernelSpec) -> float:
    """The largest, over the rows of `x`, of the norm of what `y` lacks to the product in float64, relative to the product's."""
    expected = in_float64(weight, x, need)
    return float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def in_float64(weight: Weight | PrunedWeight, x: Tensor, need: KernelSpec) -> Tensor:
    """The product with `x` rounded as `need` says; 16-bit columns and residuals meet `x` as it is, and widen no scale."""
    if isinstance(weight, PrunedWeight):
        return x.double() @ weight.dequantize(torch.float64).T
    inputs = x.float()
    if weight.columns is None:
        rounded = quantized(inputs, need)
    else:
        rounded = quantized(inputs.index_fill(1, weight.columns, 0), need)
        rounded[:, weight.columns] = inputs[:, weight.columns]
    y = rounded.double() @ replace(weight, residual=None).dequantize(torch.float64).T
    return y if weight.residual is None else weight.residual.added(y, x)


def extremes(need: KernelSpec, dtype: torch.dtype = torch.float32) -> tuple[Weight | PrunedWeight, Tensor]:
    """A weight with scales of `dtype` and rows of extreme codes, or none and all of whose values are stored, and inputs with
    rows of extreme values, the rest random."""
    generator = torch.Generator().manual_seed(0)
    if need.values is not None:
        weight, group = _pruned(need.values, generator), PRUNED_WIDTH
    else:
        weight, group = _coded(need, dtype, generator), min(need.group, MOST_COLUMNS)
    return weight.to(need.device), _inputs(weight, group, generator).to(need.device, need.dtype)


def _coded(need: KernelSpec, dtype: torch.dtype, generator: torch.Generator) -> Weight:
    group = min(need.group, MOST_COLUMNS)
    width = 3 * group if group <= FEW_COLUMNS else group
    codes = torch.randint(0, 2**need.bits, (ROWS, width), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**need.bits - 1
    codes[2, ::2], codes[2, 1::2] = 0, 2**need.bits - 1
    size = LARGEST / width
    scale = (torch.rand(ROWS, -(-width // need.group), generator=generator) + 0.5) * size / 2**need.bits
    zero = torch.randint(0, 2**need.bits, scale.shape, generator=generator)
    codebook = torch.linspace(-1, 1, 2**need.bits) ** 3 if need.codebook else None
    weight = Weight(
        codes, scale.to(dtype), None if need.symmetric or need.codebook else zero, need.bits, need.group, codebook
    )
    if "levels" in need.parts:
        two = Bilevel.fit(scale), Bilevel.fit(zero.float())
        scale, zero = (each.values(torch.float32) for each in two)
        weight = replace(weight, scale=scale, zero=zero, levels=Levels.of(*two))
    if "columns" in need.parts:
        kept = torch.randn(ROWS, KEPT, generator=generator) * size
        weight = replace(weight, columns=torch.linspace(0, width - 1, KEPT).long(), outliers=kept.half())
    return replace(weight, residual=_residual(width, size, generator)) if "residual" in need.parts else weight


def _residual(width: int, size: float, generator: torch.Generator) -> SparseRows:
    """A few entries in most rows, none in one, all in another."""
    there = torch.rand(ROWS, width, generator=generator) < SHARE
    there[3], there[4] = False, True
    return SparseRows.of(there * torch.randn(there.shape, generator=generator) * size)


def _pruned(values: torch.dtype, generator: torch.Generator) -> PrunedWeight:
    dense = torch.randn(ROWS, PRUNED_WIDTH, generator=generator) / PRUNED_WIDTH
    pruned = torch.rand(dense.shape, generator=generator) < 0.5
    pruned[0], pruned[1] = True, False
    return PrunedWeight.of(PrunedTensor.of(dense, pruned, PruneArgs(dtype=float_name(values), storage="bitmask")))


def _inputs(weight: Weight | PrunedWeight, group: int, generator: torch.Generator) -> Tensor:
    width = weight.shape[1]
    x = torch.randn(BATCH, width, generator=generator)
    x[0] = 127
    x[1] = 127 * (1 - 2 * (torch.arange(width) % 2))
    x[2], x[2, ::group] = -127, 127
    x[3], x[3, width // 2] = 1, 1e4
    x[4] = 0
    x[4, -1] = 1
    if isinstance(weight, Weight) and weight.columns is not None:
        x[5:, weight.columns] *= OUTLIER
    return x

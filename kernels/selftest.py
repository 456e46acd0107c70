"""The self-test of a kernel on this machine, once per spec, before it is used: a small product compared with float64.

The inputs are those that break kernels: all codes at their largest and smallest, activations at the ends of int8 with equal
and with alternating signs (saturating sums), one outlier, ragged rows, columns and batch sizes. The weight has the parts
that the spec names: bilevel scales, outlier columns, a residual. Silent saturation happens in practice: two int8 products that
come with torch saturate on machines without VNNI.
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
PRUNED_WIDTH = 203  # columns of a pruned weight: not a multiple of any vector or word
FEW_COLUMNS, MOST_COLUMNS = 512, 1024  # of a group, so wide that kernels cut it in all their ways
LARGEST = 4.0  # about the sum of the weights of a row, so that products fit float16
OUTLIERS, OUTLIER_FACTOR = 3, 50  # the number of outlier columns, and how many times larger their inputs are
SCALE_DTYPES = (torch.float32, torch.float16)  # kernels have a layout for each
DENSITY = 0.05  # of the residual


def failure(kernel: Kernel, spec: KernelSpec) -> str | None:
    """Why `kernel` may not be used for `spec` on this machine, or None if it passed. Raises `Unavailable` if it cannot run."""
    one_layout = spec.values is not None or "levels" in spec.parts
    for dtype in SCALE_DTYPES[:1] if one_layout else SCALE_DTYPES:
        if failed := _failure(kernel, spec, *extremes(spec, dtype)):
            return failed
    return None


def _failure(kernel: Kernel, spec: KernelSpec, weight: Weight | PrunedWeight, x: Tensor) -> str | None:
    product = prepare(kernel, weight, spec)
    allowed = max(kernel.tolerance, 4 * torch.finfo(spec.dtype).eps)
    for inputs in (x, x[-1:]):  # several rows and one, for which kernels have separate code
        error = relative_error(product(inputs), weight, inputs, spec)
        if not error <= allowed:
            return f"its self-test failed: error {error:.1e}, expected at most {allowed:.0e}"
    if not _is_lossless(product, weight):
        return "its self-test failed: the codes of its layout are not those of the weight"
    return None


def _is_lossless(product: Product, weight: Weight | PrunedWeight) -> bool:
    """Whether `product` still holds the weight exactly."""
    if isinstance(weight, Weight):
        return isinstance(product, CodedProduct) and torch.equal(product.codes(), weight.codes)
    held = product.weight if isinstance(product, PrunedProduct) else None
    return held is not None and torch.equal(held.mask, weight.mask) and torch.equal(held.values, weight.values)


def relative_error(y: Tensor, weight: Weight | PrunedWeight, x: Tensor, spec: KernelSpec) -> float:
    """The largest relative error of a row of `y`: the norm of its difference to the float64 product over the product's norm."""
    expected = in_float64(weight, x, spec)
    return float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def in_float64(weight: Weight | PrunedWeight, x: Tensor, spec: KernelSpec) -> Tensor:
    """The product in float64, with `x` rounded by `spec.activations`, except for outlier columns and residuals."""
    if isinstance(weight, PrunedWeight):
        return x.double() @ weight.dequantize(torch.float64).T
    inputs = x.float()
    if weight.columns is None:
        rounded = quantized(inputs, spec)
    else:
        rounded = quantized(inputs.index_fill(1, weight.columns, 0), spec)
        rounded[:, weight.columns] = inputs[:, weight.columns]
    y = rounded.double() @ replace(weight, residual=None).dequantize(torch.float64).T
    return y if weight.residual is None else weight.residual.added(y, x)


def extremes(spec: KernelSpec, dtype: torch.dtype = torch.float32) -> tuple[Weight | PrunedWeight, Tensor]:
    """A random weight and random inputs, with rows of extreme values.

    Some rows of the weight have the smallest and largest codes, and the scales have `dtype`; a pruned weight has a row without
    values and a row with all of them.
    """
    generator = torch.Generator().manual_seed(0)
    if spec.values is not None:
        weight, group = _pruned(spec.values, generator), PRUNED_WIDTH
    else:
        weight, group = _coded(spec, dtype, generator), min(spec.group, MOST_COLUMNS)
    return weight.to(spec.device), _inputs(weight, group, generator).to(spec.device, spec.dtype)


def _coded(spec: KernelSpec, dtype: torch.dtype, generator: torch.Generator) -> Weight:
    group = min(spec.group, MOST_COLUMNS)
    width = 3 * group if group <= FEW_COLUMNS else group
    codes = torch.randint(0, 2**spec.bits, (ROWS, width), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**spec.bits - 1
    codes[2, ::2], codes[2, 1::2] = 0, 2**spec.bits - 1
    size = LARGEST / width
    scale = (torch.rand(ROWS, -(-width // spec.group), generator=generator) + 0.5) * size / 2**spec.bits
    zero = torch.randint(0, 2**spec.bits, scale.shape, generator=generator)
    codebook = torch.linspace(-1, 1, 2**spec.bits) ** 3 if spec.codebook else None
    weight = Weight(
        codes, scale.to(dtype), None if spec.symmetric or spec.codebook else zero, spec.bits, spec.group, codebook
    )
    if "levels" in spec.parts:
        both = Bilevel.fit(scale), Bilevel.fit(zero.float())
        scale, zero = (each.values(torch.float32) for each in both)
        weight = replace(weight, scale=scale, zero=zero, levels=Levels.of(*both))
    if "columns" in spec.parts:
        outliers = torch.randn(ROWS, OUTLIERS, generator=generator) * size
        weight = replace(weight, columns=torch.linspace(0, width - 1, OUTLIERS).long(), outliers=outliers.half())
    return replace(weight, residual=_residual(width, size, generator)) if "residual" in spec.parts else weight


def _residual(width: int, size: float, generator: torch.Generator) -> SparseRows:
    """A few entries in most rows, none in one row, all in another."""
    present = torch.rand(ROWS, width, generator=generator) < DENSITY
    present[3], present[4] = False, True
    return SparseRows.of(present * torch.randn(present.shape, generator=generator) * size)


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
        x[5:, weight.columns] *= OUTLIER_FACTOR
    return x

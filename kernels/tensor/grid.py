"""Grid: scales and zeros of one weight matrix under one `QuantArgs`.

`dequantized = scale * (code - zero)` with `code` in `0 .. maxq`; rounding is half-to-even everywhere. Scales are rounded
to their stored dtype here, before any solver sees them, so that what is evaluated is what is served.

    formula   scale                                     zero                                    source
    gptq sym  2 absmax / maxq                           2**(b-1)                                GPTQ, quant.py
    gptq asym (max(xmax,0) - min(xmin,0)) / maxq        round(-xmin / scale)                    GPTQ, quant.py
    signed    absmax / (2**(b-1) - 1)                   2**(b-1)                                SmoothQuant, LLM.int8
    ds sym    2 absmax / 2**b                           2**(b-1)                                ZeroQuant
    ds asym   (xmax - xmin) / 2**b                      -round(xmin / scale)                    ZeroQuant
    awq asym  max(xmax - xmin, 1e-5) / maxq             clamp(-round(xmin / scale), 0, maxq)    AWQ
    spqr asym (xmax - xmin) / maxq                      -xmin / scale, real-valued              SpQR
    ggml sym  -extreme / 2**(b-1)                       2**(b-1)                                llama.cpp, Q5_0, Q8_0, Q6_K
    ggml asym (max(xmax,0) - min(xmin,0)) / maxq        -min(xmin,0) / scale, real-valued       llama.cpp, Q4_K

`extreme` is the value of largest magnitude, with its sign: the codes reach one step further below zero than above it.
Scales of a super-block (`scale_dtype` `super`), and its minima `scale * zero`, are whole multiples of a float16 that 256
columns share.
"""

from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from ...errors import CompressError, UsageError
from ...recipes.scheme import REAL_ZEROS, SUPER_BLOCK, QuantArgs
from ...recipes.scheme.kind_names import NF4, OUTLIER_COLUMNS

# The search of GPTQ's quantizer (quant.py, `mse=True`): shrink both ends of the range in steps of 1/100 down to 0.21.
MSE_STEPS, MSE_SHRINK, MSE_NORM = 100, 0.8, 2.4
# With importances the error is the squared one of the output: a coarse search, then steps of a half and a quarter.
WEIGHTED_STRIDE, WEIGHTED_STEPS = 12, (6, 3)
CACHED = 2**18  # weights searched at a time: what a search reads repeatedly should stay in the processor's cache
LARGEST = {
    True: 127,
    False: 63,
}  # multiples of a super-block's units, by whether it is symmetric: signed bytes, or six bits
NEARBY = (-4, -3, -2, -1, 1, 2, 3, 4)  # multiples tried around the nearest one if the observer searches
NOT_GRIDS = (NF4, OUTLIER_COLUMNS)  # kinds without groups to fit


@dataclass(frozen=True)
class Units:
    """What the scales of super-blocks, and their minima `scale * zero`, are whole multiples of.

    scale, minimum  `[rows, blocks]`, exact in float16, in the compute dtype of the weight; no `minimum` if it is symmetric
    """

    scale: Tensor
    minimum: Tensor | None

    @classmethod
    def of(cls, scale: Tensor, minimum: Tensor, args: QuantArgs) -> "Units":
        """Units of which the largest `scale` and `minimum` `[rows, groups]` of a block are the largest multiples."""

        def unit(values: Tensor) -> Tensor:
            largest = values.abs().unflatten(1, (-1, groups_of(args))).amax(-1)
            return rounded_up_from_zero(largest / LARGEST[args.symmetric], torch.float16)

        return cls(unit(scale), None if args.symmetric else unit(minimum))

    def __getitem__(self, rows: slice) -> "Units":
        return Units(self.scale[rows], _at(self.minimum, rows))

    def factors(self, scale: Tensor, minimum: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor | None]:
        """The nearest multiples that can be stored, whole floats `[rows, groups]`: scales are never 0 and keep their sign."""
        most, spread = LARGEST[args.symmetric], groups_of(args)
        factors = scale.div(self.scale.repeat_interleave(spread, 1)).round_()
        factors = factors.abs().clamp(1, most).copysign(scale)
        if self.minimum is None:
            return factors, None
        return factors, minimum.div(self.minimum.repeat_interleave(spread, 1)).round_().clamp_(0, most)

    def values(self, args: QuantArgs, factors: Tensor, minima: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero `[rows, groups]` of the multiples that `factors` found."""
        spread = groups_of(args)
        scale = factors * self.scale.repeat_interleave(spread, 1)
        if self.minimum is None or minima is None:
            return scale, torch.full_like(scale, 2 ** (args.bits - 1))
        return scale, minima * self.minimum.repeat_interleave(spread, 1) / scale


def _at(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def groups_of(args: QuantArgs) -> int:
    """Groups of a super-block."""
    return SUPER_BLOCK // (args.group_size or SUPER_BLOCK)


@dataclass(frozen=True)
class Grid:
    """Scales and zeros `[rows, groups]` (rows is 1 for per-tensor grids), in the compute dtype of the fitted weight.

    `scale` is exactly representable in `args.scale_dtype`; `zero` is integer-valued except for the spqr and ggml formulas.
    `units` are those of super-blocks, None without.
    """

    scale: Tensor
    zero: Tensor
    args: QuantArgs
    units: Units | None = None

    @classmethod
    def fit(cls, weight: Tensor, args: QuantArgs, importance: Tensor | None = None) -> "Grid":
        """Fit the grid of `weight` `[out, in]`; `args.group_size` must divide `in` (see `QuantArgs.for_width`).

        `importance` `[in]` weighs the errors of the columns if the observer searches.
        """
        rows = weight.reshape(1, -1) if args.strategy == "tensor" else weight
        groups = rows.unflatten(1, (-1, args.columns_per_scale(rows.shape[1])))
        if importance is not None:
            importance = importance.contiguous().expand_as(weight).reshape_as(rows).unflatten(1, groups.shape[1:])
        scale, zero = fit_groups(groups, args, importance)
        if args.scale_dtype != "super":
            return cls(scale, zero, args)
        units, most = Units.of(scale, scale * zero, args), max(1, CACHED // groups[:1].numel())
        parts = [
            _multiples(groups[rows], units[rows], scale[rows], zero[rows], args, _at(importance, rows))
            for rows in (slice(start, start + most) for start in range(0, len(groups), most))
        ]
        scale, zero = (torch.cat(parameter) for parameter in zip(*parts, strict=True))
        return cls(scale, zero, args, units)

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes of `weight` `[out, in]`: uint8 `[out, in]`."""
        groups = weight.unflatten(1, (-1, self.args.columns_per_scale(weight.shape[1])))
        codes = encode(groups, self.scale.unsqueeze(-1), self.zero.unsqueeze(-1), self.args)
        return codes.flatten(1).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values `[out, in]` of `codes` `[out, in]`, in the dtype of the scales."""
        return dequantize(codes, self.scale, self.zero)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`scale * (codes - zero)`, computed in the dtype of `scale`: codes `[out, in]`, scale and zero `[out|1, groups]`."""
    groups = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
    return ((groups - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)


def encode(values: Tensor, scale: Tensor, zero: Tensor, args: QuantArgs) -> Tensor:
    """Nearest codes of `values`, as floats; `scale` and `zero` broadcast."""
    if args.formula in REAL_ZEROS:  # a real-valued zero takes part in the rounding
        return (values / scale).add_(zero).round_().clamp_(0, args.maxq)
    return (values / scale).round_().add_(zero).clamp_(0, args.maxq)


def fit_groups(groups: Tensor, args: QuantArgs, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group: `groups [..., n]` gives two tensors `[...]`; `importance` broadcasts to `groups`.

    Raises `CompressError` if a scale does not fit its stored dtype, `UsageError` for other kinds of weights.
    """
    if args.kind in NOT_GRIDS:
        raise UsageError(f"{args.kind} weights have no plain grid, which is all that can be fitted")
    if args.observer == "minmax":
        return parameters(groups.amin(-1), groups.amax(-1), args)
    rows = max(1, CACHED // max(1, groups[:1].numel()))
    weights = repeat(None) if importance is None else importance.expand_as(groups).split(rows)
    parts = [_fit_mse(part, args, weight) for part, weight in zip(groups.split(rows), weights)]  # noqa: B905
    scale, zero = (torch.cat(parameter) for parameter in zip(*parts, strict=True))
    return scale, zero


def parameters(low: Tensor, high: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor]:
    """Scale and zero for values between `low` and `high` by the named formula (the table above)."""
    if args.formula in ("gptq", "ggml"):  # the range always holds zero
        low, high = low.clamp(max=0), high.clamp(min=0)
    if args.formula == "gptq":  # an all-zero group gets [-1, 1]
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    absmax = torch.maximum(low.abs(), high.abs())
    spread = 2 * absmax if args.symmetric else high - low
    steps = {"gptq": args.maxq, "signed": args.maxq - 1, "ds": args.maxq + 1, "awq": args.maxq, "spqr": args.maxq}
    steps["ggml"] = args.maxq + args.symmetric
    if args.formula == "awq":
        spread = spread.clamp(min=1e-5)
    if args.formula == "spqr":  # a constant is represented exactly, by the code 0
        spread = torch.where(spread > 0, spread, low.abs() * args.maxq)
    scale = stored(spread / steps[args.formula], args)
    if args.formula == "ggml" and args.symmetric:
        scale = torch.where(high > -low, -scale, scale)
    return scale, _zero(low, scale, args)


def stored(scale: Tensor, args: QuantArgs) -> Tensor:
    """`scale` rounded to `args.scale_dtype` and never zero, back in its compute dtype; those of super-blocks are rounded
    together (`Units`).

    Raises `CompressError` if a scale overflows that dtype.
    """
    dtype = args.torch_scale_dtype
    if scale.isfinite().all() and scale.max() > torch.finfo(dtype).max:
        raise CompressError(f"a scale of {float(scale.max()):.3g} overflows {args.scale_dtype}", "use float32 scales")
    if args.scale_dtype == "super":
        return scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return rounded_up_from_zero(scale, dtype)


def rounded_up_from_zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to `dtype`, the smallest number of that if it would be 0, back in its own dtype."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal number
    return scale.clamp(min=smallest).to(dtype).to(scale.dtype)


def _zero(low: Tensor, scale: Tensor, args: QuantArgs) -> Tensor:
    if args.symmetric:
        return torch.full_like(scale, 2 ** (args.bits - 1))
    if args.formula in REAL_ZEROS:
        return -low / scale
    zero = (-low / scale).round()
    # A scale rounded down, or a range without zero (awq, ds), may push the zero out of the stored range.
    return zero if args.formula == "ds" else zero.clamp_(0, args.maxq)


def _fit_mse(groups: Tensor, args: QuantArgs, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shrink both ends of the range together; the strictly smallest error wins, widest range first.

    The error is `sum |q - x|**2.4`, or with importances `sum importance * (q - x)**2`, whose search is coarse first.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    scale, zero = parameters(low, high, args)
    best, kept = torch.full_like(low, torch.inf), torch.ones_like(low)

    def attempt(keep: Tensor) -> None:
        nonlocal scale, zero, best, kept
        s, z = parameters(low * keep, high * keep, args)
        codes = encode(groups, s.unsqueeze(-1), z.unsqueeze(-1), args)
        error = codes.sub_(z.unsqueeze(-1)).mul_(s.unsqueeze(-1)).sub_(groups)
        error = error.abs_().pow_(MSE_NORM) if importance is None else error.square_().mul_(importance)
        error = error.sum(-1)
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better, keep, kept)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)

    for step in range(0, int(MSE_SHRINK * MSE_STEPS), 1 if importance is None else WEIGHTED_STRIDE):
        attempt(torch.full_like(low, 1 - step / MSE_STEPS))
    for step in () if importance is None else WEIGHTED_STEPS:
        around = kept
        attempt(around - step / MSE_STEPS)
        attempt(around + step / MSE_STEPS)
    return scale, zero


def _multiples(
    groups: Tensor, units: Units, scale: Tensor, zero: Tensor, args: QuantArgs, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scales and zeros of super-blocks near `scale` and `zero` `[rows, groups]`, for `groups` `[rows, groups, n]`.

    The observer `mse` tries multiples around the nearest ones, of the scale and of the minimum in turn, twice over, and takes
    what leaves the smallest square error (weighed by `importance`).
    """
    factors, minima = units.factors(scale, scale * zero, args)
    found = [factors] if minima is None else [factors, minima]
    if args.observer != "mse":
        return units.values(args, *found)
    weight = torch.ones((), dtype=groups.dtype, device=groups.device) if importance is None else importance

    def error(tried: list[Tensor]) -> Tensor:
        s, z = (t.unsqueeze(-1) for t in units.values(args, *tried))
        return encode(groups, s, z, args).sub_(z).mul_(s).sub_(groups).square_().mul_(weight).sum(-1)

    best, least = error(found), (1, 0)
    for which in list(range(len(found))) * len(found):
        start = found[which]
        for step in NEARBY:
            tried = list(found)
            tried[which] = start.abs().add(step).clamp(least[which], LARGEST[args.symmetric])
            if which == 0:
                tried[0].copysign_(start)
            now = error(tried)
            better = now < best
            best = torch.where(better, now, best)
            found[which] = torch.where(better, tried[which], found[which])
    return units.values(args, *found)

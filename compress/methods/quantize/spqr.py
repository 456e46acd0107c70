"""SpQR (Dettmers et al. 2023): small groups with quantized scales and zeros, and a few weights kept in 16 bits beside them.

Which weights: those whose removal from their group helps the rest most (leave-one-out), by the sensitivity `((w - q) / d)^2`
of the column sweep. As many are taken as the bit budget pays for, which is the published threshold solved for a size.
Only the group's smallest and largest weight shape its grid, so leaving one out means three fits per group, not one per weight.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....errors import UsageError
from ....kernels.tensor import LEVEL, Bilevel, SpQRTensor
from ....kernels.tensor.grid import Grid, encode, fit_groups, parameters
from ....recipes.scheme import QuantArgs, Scheme
from ...block import Block
from ...formats.kinds.bilevel import entries
from ...solver.refine import refine
from ...solver.sweep import sweep
from ...solver.target import DriftTarget
from .fallback import keep_better
from .gptq import GPTQ, Prepared, prepare

ROUNDS = (
    4  # outliers are chosen in so many helpings: the second largest weight of a group shows when the largest is out
)
GRID = QuantArgs(symmetric=False, group_size=32, formula="spqr", scale_dtype="bilevel", outliers=0.004)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SpQR:
    """Options of SpQR. The share of outliers, the bits and the group size are those of the scheme's weights.

    damping          added to the Hessian's diagonal, relative to its mean (the published 1.0 is far too strong)
    true_sequential  gather the statistics of each linear after the linears before it in the block were quantized
    drift            how much of what the layers before it broke a layer makes up for, 0 to 1 (calibrate/statistics/drift.py)
    refine           sweeps of descent over the codes after the column sweep (see solver/refine.py)
    """

    scheme: Scheme = Scheme(GRID)
    damping: float = 0.01
    true_sequential: bool = False
    drift: float = 0.0
    refine: int = 0

    def __post_init__(self) -> None:
        if self.scheme.weights.scale_dtype != "bilevel":
            raise UsageError("SpQR stores two-level scales", "use scale_dtype=bilevel and formula=spqr")
        if not 0 <= self.drift <= 1:
            raise UsageError(f"drift {self.drift} is no share", "use 0 (as published) to 1, for example 0.5")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics to gather."""
        return frozenset({"hessian", "drift"}) if self.drift else frozenset({"hessian"})


# `--quality`: options by preset; the first line of each is SpQR's grid.
_GRID = {"symmetric": False, "group_size": 32, "formula": "spqr", "scale_dtype": "bilevel", "outliers": 0.004}
_BEYOND = {"observer": "mse", "true_sequential": True, "drift": 0.5}
PRESETS: dict[str, dict[str, Any]] = {
    "fast": _GRID,
    "balanced": {**_GRID, **_BEYOND, "refine": 1},
    "best": {**_GRID, **_BEYOND, "refine": 4},
}


def apply(config: SpQR, block: Block) -> None:
    """Quantize every linear of the block."""
    for linear in block.linears:
        assert linear.hessian is not None
        prepared = prepare(linear.hessian.matrix(), linear.grid_args, GPTQ(damping=config.damping))
        target = prepared.drift_target(linear.drift, config.drift)
        linear.result, rounded = solve(linear.weight, prepared, linear.grid_args, config.refine, target)
        linear.figures |= {"damping": prepared.factor.damping, "outliers": len(linear.result.values)}
        keep_better(linear, prepared.hessian, target, rounded)


def solve(
    weight: Tensor, prepared: Prepared, args: QuantArgs, sweeps: int, target: DriftTarget | None = None
) -> tuple[SpQRTensor, SpQRTensor]:
    """Quantize `weight` `[out, in]`: the solution, and rounding to nearest on the same grid with the same outliers."""
    alive = weight.masked_fill(prepared.dead, 0.0)
    sensitivity = torch.empty_like(prepared.hessian.diagonal())
    sensitivity[prepared.order] = prepared.factor.upper.diagonal() ** -2
    groups = _Groups(prepared.fitted_to(alive, args, target), sensitivity, args)
    outlier = choose_outliers(groups, entries(args, *weight.shape))
    scale, zero = groups.fit(outlier)
    levels = Bilevel.fit(scale), Bilevel.fit(zero)
    if args.observer == "mse":
        levels = search_levels(groups, levels, outlier)
    grid = Grid(levels[0].values(weight.dtype), levels[1].values(weight.dtype), args)
    projection = _Projection(grid, outlier, prepared.order)
    settled = alive.T.contiguous()[prepared.order]
    errors = sweep(settled, prepared.factor.upper, projection, target=target.errors if target else None)
    codes, values = projection.codes_in_order(), settled.T[:, prepared.order.argsort()]
    tensor = _assemble(codes, levels, values, outlier, args)
    if sweeps:  # the residual of the outliers stays as it is: the dense part descends beside it
        slope = prepared.slope_(errors)
        codes, _, _ = refine(slope, prepared.hessian, prepared.shift, codes, grid, sweeps)
        tensor = replace(tensor, codes=codes)
    rounded = _Projection(grid, outlier, torch.arange(weight.shape[1], device=weight.device))
    for j in range(weight.shape[1]):
        rounded.column(j, alive[:, j])
    return tensor, _assemble(rounded.codes_in_order(), levels, alive, outlier, args)


class _Groups:
    """A weight in groups `[out, groups, size]`; the last group is filled up with repeats that count for nothing."""

    def __init__(self, weight: Tensor, sensitivity: Tensor, args: QuantArgs) -> None:
        self.width, size = weight.shape[1], args.columns_per_scale(weight.shape[1])
        missing = math.ceil(self.width / size) * size - self.width
        self.args = args
        self.values = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, size))
        self.sensitivity = torch.nn.functional.pad(sensitivity, (0, missing)).unflatten(0, (-1, size))

    def split(self, mask: Tensor) -> Tensor:
        """A mask `[out, in]` by groups; the filling is never an outlier."""
        size = self.values.shape[2]
        return torch.nn.functional.pad(mask, (0, -self.width % size)).unflatten(1, (-1, size))

    def join(self, values: Tensor) -> Tensor:
        """Values by groups as `[out, in]`."""
        return values.flatten(1)[:, : self.width]

    def fit(self, outlier: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and real zero `[out, groups]` of what is left without the outliers."""
        out = self.split(outlier)
        kept = (~out).sum(-1, keepdim=True).clamp(min=1)
        mean = self.values.masked_fill(out, 0).sum(-1, keepdim=True) / kept
        weights = self.sensitivity if self.args.observer == "mse" else None
        return fit_groups(torch.where(out, mean, self.values), self.args, weights)


def search_levels(groups: _Groups, levels: tuple[Bilevel, Bilevel], outlier: Tensor) -> tuple[Bilevel, Bilevel]:
    """Give every group the codes of scale and zero that leave the smallest weighted error, not those that are nearest.

    All codes are tried for the scale and, with the best of them, for the zero, twice over.
    """
    values, sensitivity = groups.values, groups.sensitivity * ~groups.split(outlier)
    found = list(levels)

    def error() -> Tensor:
        scale, zero = (level.values(values.dtype).unsqueeze(-1) for level in found)
        settled = encode(values, scale, zero, groups.args).sub_(zero).mul_(scale)
        return settled.sub_(values).square_().mul_(sensitivity).sum(-1)

    best = error()
    for which in (0, 1, 0, 1):
        codes = found[which].codes
        for code in range(LEVEL.maxq + 1):
            found[which] = replace(found[which], codes=torch.full_like(codes, code))
            tried = error()
            better = tried < best
            best, codes = torch.where(better, tried, best), codes.masked_fill(better, code)
        found[which] = replace(found[which], codes=codes)
    return found[0], found[1]


def choose_outliers(groups: _Groups, count: int) -> Tensor:
    """The mask bool `[out, in]` of the `count` weights whose removal from the grid of their group reduces its error most."""
    outlier = torch.zeros(len(groups.values), groups.width, dtype=torch.bool, device=groups.values.device)
    for share in range(1, ROUNDS + 1):
        wanted = count * share // ROUNDS - int(outlier.sum())
        reduction = groups.join(_reductions(groups, groups.split(outlier))).masked_fill(outlier, -torch.inf)
        outlier.view(-1)[reduction.reshape(-1).topk(wanted).indices] = True
    return outlier


def _reductions(groups: _Groups, out: Tensor) -> Tensor:
    """By how much the weighted error of its group falls when a weight is left out: `[out, groups, size]`."""
    values, sensitivity = groups.values, groups.sensitivity * ~out
    low, high = values.masked_fill(out, torch.inf), values.masked_fill(out, -torch.inf)
    smallest, largest = low.argmin(-1, keepdim=True), high.argmax(-1, keepdim=True)
    ends = low.amin(-1), high.amax(-1)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        bottom = torch.where(low <= high, low, 0)  # nothing may be left of a group
        scale, zero = (t.unsqueeze(-1) for t in parameters(bottom, torch.maximum(high, bottom), groups.args))
        settled = encode(values, scale, zero, groups.args).sub_(zero).mul_(scale)
        return (values - settled).square_().mul_(sensitivity)

    full = errors(*ends)
    total, reduction = full.sum(-1, keepdim=True), full.clone()  # leaving out an inner weight saves its own error
    without_smallest = errors(low.scatter(-1, smallest, torch.inf).amin(-1), ends[1])
    without_largest = errors(ends[0], high.scatter(-1, largest, -torch.inf).amax(-1))
    for place, error in ((smallest, without_smallest), (largest, without_largest)):
        rest = error.sum(-1, keepdim=True) - error.gather(-1, place)
        reduction.scatter_(-1, place, total - rest)
    return reduction


class _Projection:
    """Columns become points of the two-level grid, outliers stay what they are to the precision of their residual."""

    def __init__(self, grid: Grid, outlier: Tensor, order: Tensor) -> None:
        self.span: int | None = None
        self._args, self._order, self._outlier = grid.args, order, outlier.T[order]
        self._scale, self._zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()
        self._group = (order // grid.args.columns_per_scale(len(order))).tolist()
        self._codes = torch.empty(len(order), len(outlier), dtype=torch.uint8, device=order.device)

    def fit(self, start: int, columns: Tensor) -> None:
        """Everything was decided before the sweep."""

    def column(self, index: int, column: Tensor) -> Tensor:
        """Round column `index`, keep its codes; outliers add a float16 residual to their dense code."""
        scale, zero = self._scale[self._group[index]], self._zero[self._group[index]]
        codes = encode(column, scale, zero, self._args)
        self._codes[index] = codes
        dense = codes.sub_(zero).mul_(scale)
        return torch.where(self._outlier[index], dense + (column - dense).half().to(dense.dtype), dense)

    def codes_in_order(self) -> Tensor:
        """uint8 `[out, in]` in natural order."""
        codes = torch.empty_like(self._codes)
        codes[self._order] = self._codes
        return codes.T.contiguous()


def _assemble(
    codes: Tensor, levels: tuple[Bilevel, Bilevel], settled: Tensor, outlier: Tensor, args: QuantArgs
) -> SpQRTensor:
    """Join the dense part and the residual of the outliers, which `settled` `[out, in]` holds the values of."""
    counts, columns = outlier.sum(1), outlier.nonzero()[:, 1]
    empty = SpQRTensor(codes, *levels, counts, columns, settled.new_zeros(len(columns)).half(), args)
    lacking = settled - empty.dense(settled.dtype)
    return replace(empty, values=lacking[outlier].half())

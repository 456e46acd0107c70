"""SpQR (Dettmers et al. 2023): small groups with quantized scales and zeros, and a few outlier weights kept in 16 bits.

Outliers are the weights whose removal from their group lowers the error of the rest most (leave-one-out), measured by the
sensitivity `((w - q) / d)^2` of the column sweep. Their number is fixed by the bit budget, in place of the published
threshold. Only the smallest and the largest weight of a group determine its grid, so leave-one-out needs three fits per group
rather than one per weight.
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
from ....recipes.methods import Method, Needs
from ....recipes.scheme import QuantArgs, Scheme
from ....recipes.scheme.kind_names import BILEVEL
from ...block import Block
from ...formats.kinds.bilevel import entries
from ...solver.refine import refine
from ...solver.sweep import sweep
from ...solver.target import AsymmetricTarget
from .fallback import keep_better
from .gptq import GPTQ, Prepared, prepare

ROUNDS = 4  # outliers are chosen in rounds: a group's second largest weight is one only after the largest was removed
GRID = QuantArgs(symmetric=False, group_size=32, formula="spqr", scale_dtype="bilevel", outliers=0.004)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SpQR:
    """Options of SpQR. The share of outliers, the bits and the group size are those of the scheme's weights.

    damping          added to the Hessian's diagonal, relative to its mean (the published 1.0 is far too large)
    true_sequential  collect the statistics of each linear after the linears before it in the block were quantized
    drift            asymmetric calibration (GPTAQ): the share, 0 to 1, of the errors of earlier layers that a layer compensates
                     (calibrate/statistics/drift.py)
    refine           sweeps of coordinate descent over the codes after the column sweep (see solver/refine.py)
    """

    scheme: Scheme = Scheme(GRID)
    damping: float = 0.01
    true_sequential: bool = False
    drift: float = 0.0
    refine: int = 0

    def __post_init__(self) -> None:
        if self.scheme.weights.scale_dtype != "bilevel":
            raise UsageError(
                f"spqr requires scale_dtype bilevel, got {self.scheme.weights.scale_dtype}",
                "use scale_dtype=bilevel and formula=spqr",
            )
        if not 0 <= self.drift <= 1:
            raise UsageError(
                f"drift must be between 0 and 1, got {self.drift}", "use 0 (as published) or for example 0.5"
            )

    @property
    def needs(self) -> Needs:
        """The statistics to collect."""
        return Needs(hessian=True, drift=bool(self.drift))


# Options per `--quality`.
EXTENSIONS = {"observer": "mse", "true_sequential": True, "drift": 0.5}
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": EXTENSIONS | {"refine": 1},
    "best": EXTENSIONS | {"refine": 4},
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
    weight: Tensor, prepared: Prepared, args: QuantArgs, sweeps: int, target: AsymmetricTarget | None = None
) -> tuple[SpQRTensor, SpQRTensor]:
    """Quantize `weight` `[out, in]`; also returns it rounded to nearest on the same grid with the same outliers."""
    alive = weight.masked_fill(prepared.dead, 0.0)
    sensitivity = torch.empty_like(prepared.hessian.diagonal())
    sensitivity[prepared.order] = prepared.factor.upper.diagonal() ** -2
    groups = _Groups(prepared.grid_target(alive, args, target), sensitivity, args)
    outlier = choose_outliers(groups, entries(args, *weight.shape))
    scale, zero = groups.fit(outlier)
    levels = Bilevel.fit(scale), Bilevel.fit(zero)
    if args.observer == "mse":
        levels = search_levels(groups, levels, outlier)
    grid = Grid(levels[0].values(weight.dtype), levels[1].values(weight.dtype), args)
    projection = _Projection(grid, outlier, prepared.order)
    columns = alive.T.contiguous()[prepared.order]  # overwritten by the sweep with the compensated values
    errors = sweep(columns, prepared.factor.upper, projection, target=target.errors if target else None)
    codes, values = projection.codes_in_order(), columns.T[:, prepared.order.argsort()]
    tensor = _assemble(codes, levels, values, outlier, args)
    if sweeps:  # refines the dense part; the residuals of the outliers do not change
        slope = prepared.slope_(errors)
        codes, _, _ = refine(slope, prepared.hessian, prepared.shift, codes, grid, sweeps)
        tensor = replace(tensor, codes=codes)
    rounded = _Projection(grid, outlier, torch.arange(weight.shape[1], device=weight.device))
    for j in range(weight.shape[1]):
        rounded.column(j, alive[:, j])
    return tensor, _assemble(rounded.codes_in_order(), levels, alive, outlier, args)


class _Groups:
    """A weight in groups `[out, groups, size]`; the last group is padded with copies of its last column, of sensitivity 0."""

    def __init__(self, weight: Tensor, sensitivity: Tensor, args: QuantArgs) -> None:
        self.width, size = weight.shape[1], args.columns_per_scale(weight.shape[1])
        missing = math.ceil(self.width / size) * size - self.width
        self.args = args
        self.values = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, size))
        self.sensitivity = torch.nn.functional.pad(sensitivity, (0, missing)).unflatten(0, (-1, size))

    def split(self, mask: Tensor) -> Tensor:
        """A mask `[out, in]` as `[out, groups, size]`; padding is never an outlier."""
        size = self.values.shape[2]
        return torch.nn.functional.pad(mask, (0, -self.width % size)).unflatten(1, (-1, size))

    def join(self, values: Tensor) -> Tensor:
        """Values `[out, groups, size]` as `[out, in]`."""
        return values.flatten(1)[:, : self.width]

    def fit(self, outlier: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and real zero `[out, groups]` of the weights that are not outliers."""
        out = self.split(outlier)
        kept = (~out).sum(-1, keepdim=True).clamp(min=1)
        mean = self.values.masked_fill(out, 0).sum(-1, keepdim=True) / kept
        weights = self.sensitivity if self.args.observer == "mse" else None
        return fit_groups(torch.where(out, mean, self.values), self.args, weights)


def search_levels(groups: _Groups, levels: tuple[Bilevel, Bilevel], outlier: Tensor) -> tuple[Bilevel, Bilevel]:
    """The codes of scale and zero with the smallest weighted error of every group, instead of the nearest codes.

    All codes are tried for the scale, then for the zero with the best scale, and both once more.
    """
    values, sensitivity = groups.values, groups.sensitivity * ~groups.split(outlier)
    found = list(levels)

    def error() -> Tensor:
        scale, zero = (level.values(values.dtype).unsqueeze(-1) for level in found)
        rounded = encode(values, scale, zero, groups.args).sub_(zero).mul_(scale)
        return rounded.sub_(values).square_().mul_(sensitivity).sum(-1)

    best = error()
    for which in (0, 1, 0, 1):  # scale, zero, scale, zero
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
    """The decrease of the group's weighted error when a weight is left out: `[out, groups, size]`; `out` are outliers."""
    values, sensitivity = groups.values, groups.sensitivity * ~out
    low, high = values.masked_fill(out, torch.inf), values.masked_fill(out, -torch.inf)
    smallest, largest = low.argmin(-1, keepdim=True), high.argmax(-1, keepdim=True)
    ends = low.amin(-1), high.amax(-1)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        bottom = torch.where(low <= high, low, 0)  # a group may have only outliers
        scale, zero = (t.unsqueeze(-1) for t in parameters(bottom, torch.maximum(high, bottom), groups.args))
        rounded = encode(values, scale, zero, groups.args).sub_(zero).mul_(scale)
        return (values - rounded).square_().mul_(sensitivity)

    full = errors(*ends)
    total, reduction = full.sum(-1, keepdim=True), full.clone()  # leaving out an inner weight saves its own error
    without_smallest = errors(low.scatter(-1, smallest, torch.inf).amin(-1), ends[1])
    without_largest = errors(ends[0], high.scatter(-1, largest, -torch.inf).amax(-1))
    for index, error in ((smallest, without_smallest), (largest, without_largest)):
        rest = error.sum(-1, keepdim=True) - error.gather(-1, index)
        reduction.scatter_(-1, index, total - rest)
    return reduction


class _Projection:
    """Rounds columns to the bilevel grid; outliers keep their value, up to the precision of their float16 residual."""

    def __init__(self, grid: Grid, outlier: Tensor, order: Tensor) -> None:
        self.span: int | None = None
        self._args, self._order, self._outlier = grid.args, order, outlier.T[order]
        self._scale, self._zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()
        self._group = (order // grid.args.columns_per_scale(len(order))).tolist()
        self._codes = torch.empty(len(order), len(outlier), dtype=torch.uint8, device=order.device)

    def fit(self, start: int, columns: Tensor) -> None:
        """Does nothing: grids and outliers are chosen before the sweep."""

    def column(self, index: int, column: Tensor) -> Tensor:
        """The rounded `column` `[out]` at position `index` of the order; its codes are kept.

        Outliers get a float16 residual in addition to their code.
        """
        scale, zero = self._scale[self._group[index]], self._zero[self._group[index]]
        codes = encode(column, scale, zero, self._args)
        self._codes[index] = codes
        dense = codes.sub_(zero).mul_(scale)
        return torch.where(self._outlier[index], dense + (column - dense).half().to(dense.dtype), dense)

    def codes_in_order(self) -> Tensor:
        """The codes uint8 `[out, in]` in natural order."""
        codes = torch.empty_like(self._codes)
        codes[self._order] = self._codes
        return codes.T.contiguous()


def _assemble(
    codes: Tensor, levels: tuple[Bilevel, Bilevel], values: Tensor, outlier: Tensor, args: QuantArgs
) -> SpQRTensor:
    """The packed tensor of the dense part and the outliers' residuals, for the outliers' `values` `[out, in]`."""
    counts, columns = outlier.sum(1), outlier.nonzero()[:, 1]
    empty = SpQRTensor(codes, *levels, counts, columns, values.new_zeros(len(columns)).half(), args)
    residual = values - empty.dense(values.dtype)
    return replace(empty, values=residual[outlier].half())


METHOD = Method(SpQR, apply, kinds=frozenset({BILEVEL}), scheme=Scheme(GRID), presets=PRESETS)

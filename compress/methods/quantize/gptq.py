"""GPTQ (Frantar et al. 2022): quantize column by column, let the columns still to come make up for the error.

The column order, the grids and the damping are this file; the sweep, the factor and the descent after it are `solver/`.
The defaults are the published method. What goes beyond it (`weighted_grid`, `drift`, `refine`) is off until asked for;
`PRESETS` are the combinations that were measured to pay.
"""

from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....calibrate.statistics.drift import Drift
from ....errors import UsageError
from ....kernels.tensor import BlockTensor, CompressedTensor, of_grid
from ....kernels.tensor.grid import Grid, encode, fit_groups
from ....recipes.scheme import QuantArgs, Scheme
from ...block import Block, Linear
from ...solver.factor import Factor, inverse_factor, solve_upper_
from ...solver.loss import layer_loss
from ...solver.refine import refine
from ...solver.sweep import BLOCK, sweep
from ...solver.target import AsymmetricTarget, half_square
from .fallback import keep_better

Order = Literal["natural", "act", "group"]
COARSE = 3  # bits up to which grids fitted to the target lower the KL divergence by 4 %; at 4 bits by -3 to 6 %, above by nothing
DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the damping that was asked for: what `held_out` chooses from


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GPTQ:
    """Options of GPTQ.

    damping          added to the Hessian's diagonal, relative to its mean; raised tenfold while the factorisation fails
    order            columns are settled as they stand (`natural`), by falling Hessian diagonal (`act`), or in whole groups
                     by falling diagonal (`group`)
    groups           grids from the original weights (`static`) or from the compensated ones when a group is reached
                     (`dynamic`; not with order `act`, whose groups no file format can store contiguously)
    true_sequential  gather the statistics of each linear after the linears before it in the block were quantized
    block_size       columns updated one by one before the rest of the matrix is; the result does not depend on it
    weighted_grid    grids with observer `mse` weigh the error of a column by its Hessian diagonal
    drift            how much of what the layers before it broke a layer makes up for, 0 to 1 (calibrate/statistics/drift.py)
    aimed_grid       fit grids to what the solver aims at instead of the weight; None: where they have at most `COARSE` bits
    held_out         choose the damping, and the share of the drift as a share of `drift`, layer by layer: by the loss on
                     calibration batches that this choice keeps apart
    refine           sweeps of descent over scales and codes after the column sweep (see solver/refine.py)
    """

    scheme: Scheme = Scheme()
    damping: float = 0.01
    order: Order = "act"
    groups: Literal["static", "dynamic"] = "static"
    true_sequential: bool = False
    block_size: int = BLOCK
    weighted_grid: bool = False
    drift: float = 0.0
    aimed_grid: bool | None = None
    held_out: bool = False
    refine: int = 0

    def __post_init__(self) -> None:
        if self.order == "act" and self.groups == "dynamic":
            raise UsageError("order 'act' with dynamic groups scatters the groups", "use groups=static or order=group")
        if self.groups == "dynamic" and self.scheme.weights.scale_dtype == "super":
            raise UsageError("the groups of a super-block have their scales together", "use groups=static")
        if self.damping < 0:
            raise UsageError(f"damping {self.damping} is negative", "use a small positive share such as 0.01")
        if self.block_size < 1:
            raise UsageError(f"block_size {self.block_size} is not positive", f"use {BLOCK}")
        if not 0 <= self.drift <= 1:
            raise UsageError(f"drift {self.drift} is no share", "use 0 (as published) to 1, for example 0.5")
        if self.refine < 0:
            raise UsageError(f"refine {self.refine} is negative", "use a small number of sweeps such as 1, or 0")
        if self.weighted_grid and self.scheme.weights.observer != "mse":
            raise UsageError("weighted_grid needs a grid that is searched", "use observer=mse")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics to gather."""
        wanted = {"hessian": True, "drift": bool(self.drift), "held": self.held_out}
        return frozenset(name for name, needed in wanted.items() if needed)


# `--quality`: options by preset; `best` is trained after it (`tune`). `benchmarks/quality.py` measures what each gains.
BEYOND = {"observer": "mse", "weighted_grid": True, "true_sequential": True, "drift": 0.5, "refine": 1}
PRESETS: dict[str, dict[str, Any]] = {"fast": {}, "balanced": BEYOND, "best": BEYOND | {"aimed_grid": True}}


def apply(config: GPTQ, block: Block) -> None:
    """Quantize every linear of the block; linears with a common input and order share one factorisation."""
    prepared: dict[int, Prepared] = {}
    for linear in block.linears:
        assert linear.hessian is not None
        key = id(linear.hessian)
        if key not in prepared:
            sharing = [other for other in block.linears if other.hessian is linear.hessian]
            options = replace(config, damping=best_damping(config, sharing)) if linear.held else config
            # one at a time: factors are large
            prepared = {key: prepare(linear.hessian.matrix(), linear.grid_args, options)}
        share = config.drift * drift_that_lasts(linear, prepared[key].factor.damping) if linear.held else config.drift
        target = prepared[key].drift_target(linear.drift, share)
        solution = solve(linear.weight, prepared[key], linear.grid_args, config, target)
        linear.result = solution.tensor
        linear.figures |= {
            "damping": prepared[key].factor.damping,
            "drift": share if target else 0.0,
            "dead_columns": int(prepared[key].dead.sum()),
            "damped_loss": solution.damped_loss,
        }
        keep_better(linear, prepared[key].hessian, target)


def best_damping(config: GPTQ, linears: list[Linear]) -> float:
    """The damping whose solution for the `linears`, which share their inputs, loses least on the tokens held out from it."""
    assert linears[0].hessian is not None and linears[0].held is not None
    held = linears[0].held.hessian
    rest = linears[0].hessian.without(held)

    def loss(damping: float) -> float:
        options = replace(config, damping=damping, refine=0)
        prepared = prepare(rest, linears[0].grid_args, options)
        settled = (solve(linear.weight, prepared, linear.grid_args, options).tensor for linear in linears)
        deltas = (
            linear.weight - tensor.dequantize(linear.weight.dtype)
            for linear, tensor in zip(linears, settled, strict=True)
        )
        return sum(layer_loss(delta, held.matrix()) for delta in deltas)

    return min((config.damping * factor for factor in DAMPINGS), key=loss)


def drift_that_lasts(linear: Linear, damping: float) -> float:
    """The share of the correction `G Hd^-1`, 0 to 1, that helps most on tokens which it was not computed from.

    With `D` that correction from the other tokens, and `G`, `H` of those held out, the loss falls by
    `a tr(D G^T) - a^2/2 tr(D H D^T)`, which is largest at `a = tr(D G^T) / tr(D H D^T)`.
    """
    assert linear.hessian is not None and linear.held is not None
    held = linear.held
    if linear.drift is None or held.drift is None:
        return 1.0
    factor = inverse_factor(linear.hessian.without(held.hessian), damping)
    order = torch.arange(linear.weight.shape[1], device=linear.weight.device)
    correction = AsymmetricTarget.of(linear.drift.without(held.drift), 1.0, factor.upper, order).errors.T @ factor.upper
    curvature = 2 * layer_loss(correction, held.hessian.matrix())
    pull = float(torch.linalg.vecdot(correction, held.drift.matrix()).double().sum())
    return min(max(pull / curvature, 0.0), 1.0) if curvature > 0 else 1.0


@plain_dataclass(frozen=True)
class Prepared:
    """What the linears that share an input share: the Hessian with its dead columns fixed, their order, the factor."""

    hessian: Tensor  # [in, in], natural order, undamped
    dead: Tensor  # bool [in]
    order: Tensor  # int64 [in], order[i] is the i-th column to be settled
    factor: Factor  # of the Hessian in that order

    @property
    def shift(self) -> float:
        """What the damping added to the diagonal."""
        return self.factor.damping * float(self.hessian.diagonal().mean())

    def drift_target(self, drift: Drift | None, share: float) -> AsymmetricTarget | None:
        """What to imitate instead of the weight, if a share of the drift is to be made up for."""
        return (
            AsymmetricTarget.of(drift.matrix(), share, self.factor.upper, self.order)
            if share and drift is not None
            else None
        )

    def fitted_to(
        self, weight: Tensor, args: QuantArgs, target: AsymmetricTarget | None, aimed: bool | None = None
    ) -> Tensor:
        """The weight `[out, in]` that grids are fitted to: where `aimed` what the solver aims at, which costs a product."""
        wanted = args.bits <= COARSE if aimed is None else aimed
        return target.weight(weight, self.factor.upper, self.order) if target and wanted else weight

    def slope_(self, errors: Tensor) -> Tensor:
        """`Hd (W - Q)^T` `[in, out]` in natural order, from the errors `E^T` of the sweep, which are used up."""
        slope = torch.empty_like(errors)
        slope[self.order] = solve_upper_(self.factor.upper, errors)  # W - Q = E U, so Hd (W - Q)^T = U^-1 E^T
        return slope


@plain_dataclass(frozen=True)
class Solution:
    """A solved layer: the packed result and its loss `1/2 tr((W-Q) Hd (W-Q)^T)`."""

    tensor: CompressedTensor | BlockTensor
    damped_loss: float


def prepare(hessian: Tensor, args: QuantArgs, config: GPTQ) -> Prepared:
    """Fix the dead columns of `hessian` `[in, in]`, choose the order of the columns, factor."""
    dead = hessian.diagonal() <= 0
    if dead.any():
        hessian = hessian.clone()
        hessian.diagonal().add_(dead.to(hessian.dtype))
    order = column_order(hessian.diagonal(), args.columns_per_scale(len(hessian)), config.order)
    return Prepared(hessian, dead, order, inverse_factor(hessian, config.damping, order))


def column_order(diagonal: Tensor, group: int, order: Order) -> Tensor:
    """The columns in the order in which they are settled: int64 `[in]`. Ties keep the natural order."""
    if order == "natural":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if order == "act":
        return diagonal.argsort(dim=0, descending=True, stable=True)
    grouped = diagonal.unflatten(0, (-1, group))
    groups = grouped.amax(1).argsort(dim=0, descending=True, stable=True)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    return (groups.unsqueeze(1) * group + inside[groups]).flatten()


def solve(
    weight: Tensor, prepared: Prepared, args: QuantArgs, config: GPTQ, target: AsymmetricTarget | None = None
) -> Solution:
    """Quantize `weight` `[out, in]` float32 or float64 against the prepared Hessian. `weight` is left as it is."""
    alive = weight.masked_fill(prepared.dead, 0.0) if prepared.dead.any() else weight
    codes, grid, errors = swept(alive, prepared, args, config, target)
    loss = half_square(errors)
    if config.refine:
        slope = prepared.slope_(errors)
        del errors  # used up, and as large as the weight
        codes, grid, fallen = refine(slope, prepared.hessian, prepared.shift, codes, grid, config.refine)
        loss -= fallen
    return Solution(of_grid(codes, grid), loss)


def swept(
    weight: Tensor, prepared: Prepared, args: QuantArgs, config: GPTQ, target: AsymmetricTarget | None = None
) -> tuple[Tensor, Grid, Tensor]:
    """The published method alone: codes `[out, in]`, their grid, and the scaled errors `E^T` `[in, out]` of the sweep."""
    importance = prepared.hessian.diagonal() if config.weighted_grid else None
    fitted = prepared.fitted_to(weight, args, target, config.aimed_grid)
    projection = GridProjection(fitted, prepared.order, args, config.groups == "dynamic", importance)
    columns = weight.T.contiguous()[prepared.order]
    errors = sweep(columns, prepared.factor.upper, projection, config.block_size, target.errors if target else None)
    return *projection.result(), errors


class GridProjection:
    """Columns become points of a grid, fitted before the sweep or when their group is reached (`dynamic`)."""

    def __init__(
        self, weight: Tensor, order: Tensor, args: QuantArgs, dynamic: bool, importance: Tensor | None = None
    ) -> None:
        group = args.columns_per_scale(weight.shape[1])
        self.span = group if dynamic and args.strategy == "group" else None
        grid = Grid.fit(weight, args, importance)
        rows = weight.shape[0]
        self._args, self._order, self._importance, self._units = args, order, importance, grid.units
        self._scale = grid.scale.expand(rows, -1).T.contiguous()  # [groups, out]
        self._zero = grid.zero.expand(rows, -1).T.contiguous()
        self._group = (order // group).tolist() if args.strategy == "group" else [0] * weight.shape[1]
        self._codes = weight.new_empty(weight.shape[1], rows, dtype=torch.uint8)

    def fit(self, start: int, columns: Tensor) -> None:
        """Fit the grid of the group that begins at `start` to its current values `[span, out]`."""
        importance = None if self._importance is None else self._importance[self._order[start : start + len(columns)]]
        scale, zero = fit_groups(columns.T, self._args, importance)
        self._scale[self._group[start]], self._zero[self._group[start]] = scale, zero

    def column(self, index: int, column: Tensor) -> Tensor:
        """Round column `index` and keep its codes."""
        scale, zero = self._scale[self._group[index]], self._zero[self._group[index]]
        codes = encode(column, scale, zero, self._args)
        self._codes[index] = codes
        return codes.sub_(zero).mul_(scale)

    def result(self) -> tuple[Tensor, Grid]:
        """The codes in natural order, uint8 `[out, in]`, and their grid."""
        codes = torch.empty_like(self._codes)
        codes[self._order] = self._codes
        return codes.T.contiguous(), Grid(
            self._scale.T.contiguous(), self._zero.T.contiguous(), self._args, self._units
        )

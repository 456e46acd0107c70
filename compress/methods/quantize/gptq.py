"""GPTQ (Frantar et al. 2022): quantize column by column; the columns that follow compensate each column's error.

This file holds the column order, the grids and the damping; the sweep, the factorisation and the descent after the sweep are
in `solver/`. The defaults are the published method. Extensions of it (`weighted_grid`, `drift`, `refine`) are off by default;
`PRESETS` are combinations that improved accuracy in measurements.
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
# Grids fitted to the target lower the KL divergence by 4 % up to 3 bits, by -3 to 6 % at 4 bits, and not at all above.
COARSE_BITS = 3
DAMPING_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # multiples of the option `damping` that `held_out` chooses from


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GPTQ:
    """Options of GPTQ.

    damping          added to the Hessian's diagonal, relative to its mean; raised tenfold until the factorisation succeeds
    order            columns are quantized as stored (`natural`), by falling Hessian diagonal (`act`), or in whole groups by
                     falling diagonal (`group`)
    groups           grids are fitted to the original weights (`static`), or to the compensated ones when a group is reached
                     (`dynamic`; not with order `act`, whose groups no file format can store contiguously)
    true_sequential  collect the statistics of each linear after the linears before it in the block were quantized
    block_size       columns updated one by one before the rest of the matrix is updated; does not change the result
    weighted_grid    grids with observer `mse` weight the error of a column by its Hessian diagonal
    drift            asymmetric calibration (GPTAQ): the share, 0 to 1, of the errors of earlier layers that a layer compensates
                     (calibrate/statistics/drift.py)
    aimed_grid       fit grids to the weight that the solver approximates with `drift`, instead of the original one; by
                     default (None) for at most 3 bits
    held_out         choose the damping, and the share of the drift as a fraction of `drift`, separately for each layer, by the
                     loss on calibration batches that are held out from the choice
    refine           sweeps of coordinate descent over scales and codes after the column sweep (see solver/refine.py)
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
            raise UsageError("order=act cannot be combined with groups=dynamic", "use groups=static or order=group")
        if self.groups == "dynamic" and self.scheme.weights.scale_dtype == "super":
            raise UsageError(
                "groups=dynamic cannot be combined with super-blocks, whose groups store their scales together",
                "use groups=static",
            )
        if self.damping < 0:
            raise UsageError(f"damping must be at least 0, got {self.damping}", "use a small value such as 0.01")
        if self.block_size < 1:
            raise UsageError(f"block_size must be at least 1, got {self.block_size}", f"use {BLOCK}")
        if not 0 <= self.drift <= 1:
            raise UsageError(
                f"drift must be between 0 and 1, got {self.drift}", "use 0 (as published) or for example 0.5"
            )
        if self.refine < 0:
            raise UsageError(
                f"refine must be at least 0, got {self.refine}", "use 0 or a small number of sweeps such as 1"
            )
        if self.weighted_grid and self.scheme.weights.observer != "mse":
            raise UsageError(
                f"weighted_grid requires observer mse, got {self.scheme.weights.observer}", "use observer=mse"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The statistics to collect."""
        wanted = {"hessian": True, "drift": bool(self.drift), "held": self.held_out}
        return frozenset(name for name, needed in wanted.items() if needed)


# Options per `--quality`; `best` is followed by training (`tune`). `benchmarks/quality.py` measures the gain of each.
EXTENSIONS = {"observer": "mse", "weighted_grid": True, "true_sequential": True, "drift": 0.5, "refine": 1}
PRESETS: dict[str, dict[str, Any]] = {"fast": {}, "balanced": EXTENSIONS, "best": EXTENSIONS | {"aimed_grid": True}}


def apply(config: GPTQ, block: Block) -> None:
    """Quantize every linear of the block; linears with a common input and order share one factorisation."""
    prepared: dict[int, Prepared] = {}
    for linear in block.linears:
        assert linear.hessian is not None
        key = id(linear.hessian)
        if key not in prepared:
            sharing = [other for other in block.linears if other.hessian is linear.hessian]
            options = replace(config, damping=best_damping(config, sharing)) if linear.held_out else config
            # one at a time: factors are large
            prepared = {key: prepare(linear.hessian.matrix(), linear.grid_args, options)}
        share = (
            config.drift * held_out_drift_share(linear, prepared[key].factor.damping)
            if linear.held_out
            else config.drift
        )
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
    """The damping with the least loss on the held-out tokens, for `linears` that share their inputs.

    The solutions are computed from the other tokens; candidates are the multiples `DAMPING_FACTORS` of `config.damping`.
    """
    assert linears[0].hessian is not None and linears[0].held_out is not None
    held = linears[0].held_out.hessian
    rest = linears[0].hessian.without(held)

    def loss(damping: float) -> float:
        options = replace(config, damping=damping, refine=0)
        prepared = prepare(rest, linears[0].grid_args, options)
        solved = (solve(linear.weight, prepared, linear.grid_args, options).tensor for linear in linears)
        deltas = (
            linear.weight - tensor.dequantize(linear.weight.dtype)
            for linear, tensor in zip(linears, solved, strict=True)
        )
        return sum(layer_loss(delta, held.matrix()) for delta in deltas)

    return min((config.damping * factor for factor in DAMPING_FACTORS), key=loss)


def held_out_drift_share(linear: Linear, damping: float) -> float:
    """The share `a` of the drift correction `G Hd^-1`, 0 to 1, with the least loss on the held-out tokens.

    Let `D` be the correction computed from the other tokens, and `G`, `H` the statistics of the held-out ones. A share `a`
    lowers the loss by `a tr(D G^T) - a^2/2 tr(D H D^T)`, which is largest at `a = tr(D G^T) / tr(D H D^T)`.
    """
    assert linear.hessian is not None and linear.held_out is not None
    held = linear.held_out
    if linear.drift is None or held.drift is None:
        return 1.0
    factor = inverse_factor(linear.hessian.without(held.hessian), damping)
    order = torch.arange(linear.weight.shape[1], device=linear.weight.device)
    correction = AsymmetricTarget.of(linear.drift.without(held.drift), 1.0, factor.upper, order).errors.T @ factor.upper
    curvature = 2 * layer_loss(correction, held.hessian.matrix())
    gain = float(torch.linalg.vecdot(correction, held.drift.matrix()).double().sum())
    return min(max(gain / curvature, 0.0), 1.0) if curvature > 0 else 1.0


@plain_dataclass(frozen=True)
class Prepared:
    """What linears with the same input have in common: Hessian, column order and factorisation."""

    hessian: Tensor  # [in, in], natural order, undamped; the diagonal of dead columns is 1
    dead: Tensor  # bool [in], columns whose inputs are all zero
    order: Tensor  # int64 [in], order[i] is the i-th column to be quantized
    factor: Factor  # of the Hessian in that order

    @property
    def shift(self) -> float:
        """The amount that damping added to the diagonal."""
        return self.factor.damping * float(self.hessian.diagonal().mean())

    def drift_target(self, drift: Drift | None, share: float) -> AsymmetricTarget | None:
        """The target of the solver that compensates a `share` of the drift; None if there is nothing to compensate."""
        return (
            AsymmetricTarget.of(drift.matrix(), share, self.factor.upper, self.order)
            if share and drift is not None
            else None
        )

    def grid_target(
        self, weight: Tensor, args: QuantArgs, target: AsymmetricTarget | None, use_target: bool | None = None
    ) -> Tensor:
        """The weight `[out, in]` that grids are fitted to.

        With `use_target` (default: for at most `COARSE_BITS` bits), the weight that the solver approximates, which costs a
        matrix product; else `weight`.
        """
        if use_target is None:
            use_target = args.bits <= COARSE_BITS
        return target.weight(weight, self.factor.upper, self.order) if target and use_target else weight

    def slope_(self, errors: Tensor) -> Tensor:
        """`Hd (W - Q)^T` `[in, out]` in natural order, from the errors `E^T` of the sweep, which are overwritten."""
        slope = torch.empty_like(errors)
        slope[self.order] = solve_upper_(self.factor.upper, errors)  # W - Q = E U, so Hd (W - Q)^T = U^-1 E^T
        return slope


@plain_dataclass(frozen=True)
class Solution:
    """A solved layer: the packed result and its loss `1/2 tr((W-Q) Hd (W-Q)^T)`."""

    tensor: CompressedTensor | BlockTensor
    damped_loss: float


def prepare(hessian: Tensor, args: QuantArgs, config: GPTQ) -> Prepared:
    """Set the diagonal of dead columns of `hessian` `[in, in]` to 1, choose the column order, and factorise."""
    dead = hessian.diagonal() <= 0
    if dead.any():
        hessian = hessian.clone()
        hessian.diagonal().add_(dead.to(hessian.dtype))
    order = column_order(hessian.diagonal(), args.columns_per_scale(len(hessian)), config.order)
    return Prepared(hessian, dead, order, inverse_factor(hessian, config.damping, order))


def column_order(diagonal: Tensor, group: int, order: Order) -> Tensor:
    """The columns in the order in which they are quantized, int64 `[in]`. Ties keep the natural order."""
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
    """Quantize `weight` `[out, in]` float32 or float64 with the prepared Hessian and an optional `target`. `weight` is kept."""
    alive = weight.masked_fill(prepared.dead, 0.0) if prepared.dead.any() else weight
    codes, grid, errors = sweep_columns(alive, prepared, args, config, target)
    loss = half_square(errors)
    if config.refine:
        slope = prepared.slope_(errors)
        del errors  # overwritten, and as large as the weight
        codes, grid, decrease = refine(slope, prepared.hessian, prepared.shift, codes, grid, config.refine)
        loss -= decrease
    return Solution(of_grid(codes, grid), loss)


def sweep_columns(
    weight: Tensor, prepared: Prepared, args: QuantArgs, config: GPTQ, target: AsymmetricTarget | None = None
) -> tuple[Tensor, Grid, Tensor]:
    """The published method without refinement: codes uint8 `[out, in]`, their grid, and the sweep's scaled errors `E^T`
    `[in, out]`."""
    importance = prepared.hessian.diagonal() if config.weighted_grid else None
    fitted = prepared.grid_target(weight, args, target, config.aimed_grid)
    projection = GridProjection(fitted, prepared.order, args, config.groups == "dynamic", importance)
    columns = weight.T.contiguous()[prepared.order]
    errors = sweep(columns, prepared.factor.upper, projection, config.block_size, target.errors if target else None)
    return *projection.result(), errors


class GridProjection:
    """Rounds columns to a grid, fitted before the sweep or, if `dynamic`, when the sweep reaches their group."""

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
        """Fit the grid of the group that starts at position `start` to its current values `[span, out]`."""
        importance = None if self._importance is None else self._importance[self._order[start : start + len(columns)]]
        scale, zero = fit_groups(columns.T, self._args, importance)
        self._scale[self._group[start]], self._zero[self._group[start]] = scale, zero

    def column(self, index: int, column: Tensor) -> Tensor:
        """The rounded `column` `[out]` at position `index` of the order; its codes are kept."""
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

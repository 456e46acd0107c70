"""Coordinate descent after the sweep: group scales and codes move, one at a time, to the minimum of the damped loss.

The sweep settles each column once; here every column is optimized again with all others in place, and every group's scale is
fitted to its final codes. Each move is the exact minimum over its own variable, so `1/2 tr((W-Q) Hd (W-Q)^T)` only falls; the
damped `Hd` keeps the descent from fitting noise in the calibration tokens.

A move depends on `W` only through the slope `Hd (W - Q)^T`, which after a sweep is one triangular solve. The slope is updated
by halves, so that almost all work is matrix products.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.tensor.grid import LARGEST, Grid, Units, groups_of, stored
from ...recipes.scheme import QuantArgs

BLOCK = 512  # columns whose moves update the slope of all other columns by one product
TILE = 32  # columns whose moves update each other's slope one by one


def refine(
    slope: Tensor, hessian: Tensor, shift: float, codes: Tensor, grid: Grid, sweeps: int
) -> tuple[Tensor, Grid, float]:
    """Descend from `codes` uint8 `[out, in]` on `grid`, at most `sweeps` times over all columns.

    `Hd = H + shift * I`, with `hessian` `H` `[in, in]` in natural order; `slope` `Hd (W - Q)^T` `[in, out]` is overwritten.
    Returns uint8 codes, the grid, and by how much the damped loss fell; stops early if nothing moves. Scales per row move:
    those of a whole tensor and SpQR's do not, and scales and minima of super-blocks move in multiples of their unit.
    """
    descent = Descent.start(slope, hessian, shift, codes, grid)
    fallen = 0.0
    for left in reversed(range(sweeps)):
        fall = descent.sweep(last=left == 0)
        fallen += fall
        if fall == 0:
            break
    scale, zero = descent.scale.T.contiguous(), grid.zero if grid.units is None else descent.zero.T.contiguous()
    return descent.codes.T.contiguous(), replace(grid, scale=scale, zero=zero), fallen


@dataclass
class Descent:
    """The state of a descent, held transposed and changed in place: `Q^T = scale * (codes - zero)`, group by group.

    codes uint8 `[in, out]`; scale `[groups, out]` representable in its stored dtype; zero `[groups, out]`; slope `[in, out]`.
    """

    slope: Tensor
    hessian: Tensor
    shift: float
    codes: Tensor
    scale: Tensor
    zero: Tensor
    args: QuantArgs
    units: Units | None = None  # `[out, blocks]`

    @classmethod
    def start(cls, slope: Tensor, hessian: Tensor, shift: float, codes: Tensor, grid: Grid) -> "Descent":
        """Descend from `codes` `[out, in]` on `grid`."""
        scale, zero = (
            t.expand(len(codes), -1).T.clone(memory_format=torch.contiguous_format) for t in (grid.scale, grid.zero)
        )
        transposed = codes.T.clone(memory_format=torch.contiguous_format)
        return cls(slope, hessian, shift, transposed, scale, zero, grid.args, grid.units)

    def sweep(self, last: bool) -> float:
        """One pass over all groups; the fall of the damped loss. The `last` one does not update the slope of columns behind."""
        width, size = len(self.hessian), self.args.columns_per_scale(len(self.hessian))
        fallen = torch.zeros(self.slope.shape[1], dtype=torch.float64, device=self.slope.device)
        step = size * max(1, BLOCK // size)
        moves = torch.empty_like(self.slope[:step])
        for start in range(0, width, step):
            block = slice(start, min(start + step, width))
            moved = moves[: block.stop - start]
            self._halves(block, size, moved, lambda part, out: fallen.add_(self._group(part, out, last)), last)
            self._update_slope(slice(block.stop, width), block, moved)
            if not last:
                self._update_slope(slice(0, start), block, moved)
        return float(fallen.sum())

    def move_scale(self, group: slice, moves: Tensor) -> Tensor:
        """Fit the scale of one group to its codes, all else fixed; a row whose loss would grow by rounding keeps its scale.

        Fills in `moves` `[size, out]`, by how much `Q^T` grew; returns the fall of the loss `[out]`.
        """
        index = group.start // self.args.columns_per_scale(len(self.codes))
        scale = self.scale[index]
        minimum = None if self.units is None or self.args.symmetric else self.zero[index] * scale
        steps = torch.sub(self.codes[group].to(scale.dtype), self.zero[index] if minimum is None else 0, out=moves)
        change, gain = self._move(group, scale, steps, lambda best: self._scale_near(best, scale, index))
        self.scale[index] = scale + change
        if minimum is not None:  # the minimum stays, and zero is counted in scales
            self.zero[index] = minimum / self.scale[index]
        return gain

    def move_minimum(self, group: slice, moves: Tensor) -> Tensor:
        """Fit the minimum of one group of a super-block, as `move_scale` does the scale."""
        assert self.units is not None and self.units.minimum is not None
        index = group.start // self.args.columns_per_scale(len(self.codes))
        unit, minimum = self.units.minimum[:, index // groups_of(self.args)], self.zero[index] * self.scale[index]
        largest = LARGEST[self.args.symmetric]
        change, gain = self._move(
            group, minimum, moves.fill_(-1), lambda best: best.div_(unit).round_().clamp_(0, largest).mul_(unit)
        )
        self.zero[index] = (minimum + change) / self.scale[index]
        return gain

    def _move(
        self, group: slice, value: Tensor, steps: Tensor, rounded: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The change of `value` `[out]`, with `Q^T` growing by `steps` `[size, out]` per unit of it, and the fall of the loss.

        `rounded` gives the storable value next to the best one. Updates the slope; `steps` become the growth of `Q^T`.
        """
        near = (self.hessian[group, group] @ steps).add_(steps, alpha=self.shift)
        curvature = torch.linalg.vecdot(near, steps, dim=0)
        pull = torch.linalg.vecdot(self.slope[group], steps, dim=0)
        change = rounded(value + pull / curvature.clamp(min=torch.finfo(value.dtype).tiny)) - value
        gain = change * (pull - change * curvature / 2)
        change = change.where(gain > 0, 0)
        self.slope[group] -= near.mul_(change)
        steps.mul_(change)
        return change, gain.clamp_(min=0)

    def _scale_near(self, best: Tensor, scale: Tensor, index: int) -> Tensor:
        """The storable scale next to `best` `[out]`; the old one if the sign would change."""
        if self.units is None:
            near = stored(best.abs(), self.args).copysign(scale)
        else:
            unit = self.units.scale[:, index // groups_of(self.args)]
            near = best.div(unit).round_().abs_().clamp_(1, LARGEST[self.args.symmetric]).mul_(unit).copysign_(scale)
        return torch.where(best * scale > 0, near, scale)

    def _group(self, group: slice, moves: Tensor, last: bool) -> Tensor:
        """Move the scale and then every code of one group; `moves` `[size, out]` is by how much `Q^T` grew."""
        gain, moved = torch.zeros_like(self.scale[0]), torch.zeros_like(moves)
        if self.args.strategy != "tensor" and self.args.scale_dtype != "bilevel":
            gain += self.move_scale(group, moved)
        if self.units is not None and self.units.minimum is not None:
            further = torch.empty_like(moved)
            gain += self.move_minimum(group, further)
            moved += further
        self._halves(group, TILE, moves, lambda part, out: gain.add_(self._tile(part, out, last)), last)
        moves += moved  # the slope of the group itself is up to date
        return gain

    def _tile(self, tile: slice, moves: Tensor, last: bool) -> Tensor:
        """Move every code of a few columns, one column after another, to the grid point nearest to its own optimum."""
        index = tile.start // self.args.columns_per_scale(len(self.codes))
        scale, inverse = self.scale[index], self.scale[index].reciprocal()
        corner = self.hessian[tile, tile].clone()
        corner.diagonal().add_(self.shift)
        slope, codes = self.slope[tile], self.codes[tile].to(scale.dtype)
        curvature = corner.diagonal()
        lines = zip(slope.unbind(), codes.unbind(), moves.unbind(), curvature.tolist(), strict=True)
        for j, (pull, code, move, stiffness) in enumerate(lines):
            best = torch.addcmul(code, pull, inverse, value=1 / stiffness).round_().clamp_(0, self.args.maxq)
            torch.sub(best, code, out=move).mul_(scale)
            code.copy_(best)
            slope[j + 1 :].addr_(corner[j, j + 1 :], move, alpha=-1)
        self.codes[tile] = codes.to(torch.uint8)
        gain = torch.linalg.vecdot(slope - moves * (curvature / 2).unsqueeze(1), moves, dim=0)
        if not last:
            slope.addmm_(corner.triu(), moves, alpha=-1)
        return gain

    def _halves(
        self, span: slice, unit: int, moves: Tensor, move: Callable[[slice, Tensor], object], last: bool
    ) -> None:
        """Call `move` on parts of `unit` columns from left to right, each with the slope updated by the parts before it."""
        units = -(-(span.stop - span.start) // unit)
        if units == 1:
            move(span, moves)
            return
        middle = span.start + units // 2 * unit
        left, right = slice(span.start, middle), slice(middle, span.stop)
        first, second = moves[: middle - span.start], moves[middle - span.start :]
        self._halves(left, unit, first, move, last)
        self._update_slope(right, left, first)
        self._halves(right, unit, second, move, last)
        if not last:
            self._update_slope(left, right, second)

    def _update_slope(self, others: slice, span: slice, moves: Tensor) -> None:
        """Update the slope of other columns by the `moves` `[span, out]` of `Q^T`."""
        self.slope[others].addmm_(self.hessian[others, span], moves, alpha=-1)

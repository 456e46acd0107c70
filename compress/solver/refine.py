"""Descent after the sweep: group scales and codes move, one at a time, to where the damped loss is smallest.

The sweep settles a column for good when it comes to it; here every column is looked at again with all others in place, and
every group's scale is fitted to the codes that it ended up with. Each move is the exact minimum over its own variable, so
`1/2 tr((W-Q) Hd (W-Q)^T)` only falls; the damped `Hd` keeps the descent from fitting noise in the calibration tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import Grid, encode, stored
from ..scheme import QuantArgs

BLOCK = 128  # columns that see each other's moves at once; the rest of the matrix learns of them by one product


def refine(target: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, sweeps: int) -> tuple[Tensor, Grid, float]:
    """Descend from `codes` `[out, in]` on `grid` towards `target` `W` `[out, in]`, at most `sweeps` times over all columns.

    `hessian` `[in, in]` is damped, in natural order and in the dtype of `target`. Returns uint8 codes, the grid, and by how
    much the damped loss fell; stops early when nothing moves any more. Scales move where each is a row's own plain number:
    those of a whole tensor and two-level ones stay.
    """
    goal, lattice = target.T.contiguous(), _Lattice.of(codes, grid)
    delta = goal - lattice.settled()
    fallen = 0.0
    for _ in range(sweeps):
        fall = _sweep(goal, hessian, lattice, delta)
        fallen += fall
        if fall == 0:
            break
    settled = Grid(lattice.scale.T.contiguous(), grid.zero, grid.args)
    return lattice.codes.T.to(torch.uint8).contiguous(), settled, fallen


@dataclass(frozen=True)
class _Lattice:
    """A quantized matrix held transposed: `Q^T = scale * (codes - zero)`, group by group; changed in place.

    codes `[in, out]` whole numbers as floats; scale `[groups, out]` representable in its stored dtype; zero `[groups, out]`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    args: QuantArgs

    @classmethod
    def of(cls, codes: Tensor, grid: Grid) -> "_Lattice":
        values = codes.T.to(grid.scale.dtype).contiguous()
        scale, zero = (
            t.expand(len(codes), -1).T.clone(memory_format=torch.contiguous_format) for t in (grid.scale, grid.zero)
        )
        return cls(values, scale, zero, grid.args)

    @property
    def size(self) -> int:
        """Columns of a group; the last one may be shorter."""
        return self.args.columns_per_scale(len(self.codes))

    @property
    def scales_move(self) -> bool:
        return self.args.strategy != "tensor" and self.args.scale_dtype != "bilevel"

    def settled(self) -> Tensor:
        """`Q^T` `[in, out]`."""
        scale, zero = (t.repeat_interleave(self.size, 0)[: len(self.codes)] for t in (self.scale, self.zero))
        return (self.codes - zero).mul_(scale)


def _sweep(goal: Tensor, hessian: Tensor, lattice: _Lattice, delta: Tensor) -> float:
    """One pass over all groups. `delta` `W^T - Q^T` is kept up to date. Returns the fall of the damped loss.

    The slope `Hd (W - Q)^T` of a block is one product when the block is reached, and exact within the block after that.
    """
    width, size = len(hessian), lattice.size
    fallen = torch.zeros(goal.shape[1], dtype=torch.float64, device=goal.device)
    span = size * max(1, BLOCK // size)
    for start in range(0, width, span):
        stop = min(start + span, width)
        slope = hessian[start:stop] @ delta
        for first in range(start, stop, size):
            group = slice(first, min(first + size, stop))
            if lattice.scales_move:
                fallen += _move_scale(hessian, lattice, delta, slope, start, group)
            fallen += _move_codes(goal, hessian, lattice, delta, slope, start, group)
    return float(fallen.sum())


def _move_scale(hessian: Tensor, lattice: _Lattice, delta: Tensor, slope: Tensor, start: int, group: slice) -> Tensor:
    """Fit the scale of one group to its codes, all else fixed; refused per row where rounding spoils it."""
    index = group.start // lattice.size
    steps = lattice.codes[group] - lattice.zero[index]
    near = hessian[group, group] @ steps
    curvature = (near * steps).sum(0)
    pull = (slope[group.start - start : group.stop - start] * steps).sum(0)
    scale = lattice.scale[index]
    best = scale + pull / curvature.clamp(min=torch.finfo(scale.dtype).tiny)
    wanted = torch.where(best > 0, stored(best, lattice.args), scale)
    change = wanted - scale
    gain = change * (pull - change * curvature / 2)
    change = change.where(gain > 0, 0)
    lattice.scale[index] = scale + change
    moved = steps * change
    delta[group] -= moved
    rest = slice(group.start, start + len(slope))
    slope[group.start - start :].addmm_(hessian[rest, group], moved, alpha=-1)
    return gain.clamp(min=0).double()


def _move_codes(
    goal: Tensor, hessian: Tensor, lattice: _Lattice, delta: Tensor, slope: Tensor, start: int, group: slice
) -> Tensor:
    """Move every code of one group, column after column, to the grid point nearest to its own optimum."""
    index = group.start // lattice.size
    scale, zero = lattice.scale[index], lattice.zero[index]
    gain = torch.zeros_like(scale)
    for j in range(group.start, group.stop):
        curvature, pull = hessian[j, j], slope[j - start]
        codes = encode(goal[j] - delta[j] + pull / curvature, scale, zero, lattice.args)
        change = (codes - lattice.codes[j]).mul_(scale)
        lattice.codes[j] = codes
        gain += change * (pull - change * (curvature / 2))
        delta[j] -= change
        slope[j + 1 - start :].addr_(hessian[j, j + 1 : start + len(slope)], change, alpha=-1)
    return gain.double()

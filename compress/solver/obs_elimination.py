"""Exact greedy elimination of the weights of every row, cheapest first: ExactOBS and OBQ (Frantar et al. 2022).

Every output row is its own problem with the same Hessian. To settle a weight is to prune it or to round it for good. Settling
weight `p` of a row costs `e_p^2 / (2 [H^-1]_pp)`, moves the others by `-H^-1[:, p] e_p / [H^-1]_pp`, and removes row and column
`p` from that row's inverse (Lemma 1 of the paper): `H^-1 -= H^-1[:, p] H^-1[p, :] / [H^-1]_pp`.

Rows are processed in batches. Within a panel of steps the inverse does not change: the updates are kept as a factor `U` per
row (the current inverse is `H^-1 - U^T U`, and a step needs one column of it only). After the panel each row's own inverse is
updated by one matrix product; once a share of its columns is settled, the inverse is copied without them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.tensor.grid import Grid, encode
from ...recipes.scheme.prune_args import layer_zeros

PANEL = 48  # columns settled per row before the inverse is updated
SHRINK = 0.25  # share of the columns that are settled before the inverse is copied without them
BATCH_BYTES = 2**27  # memory for the copies of the inverse
ROWS_AT_ONCE = 8  # rows whose inverses are copied at a time

# (weights `[rows, m]`, diagonal of their inverse) -> (what settling subtracts from each, the key: the smallest is next)
Criterion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Projection(Protocol):
    """What a settled weight becomes: gives the criterion for the weights at `rows` and original `columns` `[rows, m]`."""

    def __call__(self, rows: slice, columns: Tensor) -> Criterion: ...


@dataclass(frozen=True)
class EliminationTrace:
    """The result of `eliminate`, from which the mask of every sparsity up to the one reached follows.

    order    int32 `[rows, steps]`: the blocks in the order in which they were settled (columns if `block` is 1)
    losses   `[rows, steps]`: what each step adds to `1/2 tr((W-Q) H (W-Q)^T)`; not monotone along a row
    settled  `[rows, cols]`: the weights after the last step
    block    columns per block
    """

    order: Tensor
    losses: Tensor
    settled: Tensor
    block: int = 1

    def mask(self, sparsity: float) -> Tensor:
        """What is pruned, bool `[rows, cols]`, if the layer as a whole loses the share `sparsity` of its blocks.

        The `ceil(rows * blocks * sparsity)` smallest losses of all rows are counted per row, and a row loses that many of the
        blocks that it settled first (identity I5; these need not be the blocks that were counted, as losses are not monotone).
        """
        total = layer_zeros(self.losses.shape[0] * -(-self.settled.shape[1] // self.block), sparsity)
        cheapest = self.losses.flatten().argsort(stable=True)[:total]
        return self.first(torch.bincount(cheapest // self.losses.shape[1], minlength=len(self.losses)))

    def first(self, counts: Tensor | int) -> Tensor:
        """The first `counts` (`[rows]`) blocks that each row settled, as a mask bool `[rows, cols]`."""
        rows, width = self.settled.shape
        counts = torch.as_tensor(counts, device=self.order.device).expand(rows).unsqueeze(1)
        taken = torch.arange(self.order.shape[1], device=self.order.device) < counts
        blocks = torch.zeros(rows, -(-width // self.block), dtype=torch.bool, device=self.order.device)
        return blocks.scatter_(1, self.order.long(), taken).repeat_interleave(self.block, dim=1)[:, :width]


def eliminate(
    weight: Tensor,
    inverse: Tensor,
    projection: Projection | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    block: int = 1,
    rows_at_once: int | None = None,
) -> EliminationTrace:
    """Settle the weights of every row of `weight` `[rows, cols]`, cheapest first; the others compensate each of them.

    `inverse` is `Hd^-1` `[cols, cols]`, or one per row `[rows, cols, cols]`, in the dtype of `weight`. Without a `projection`
    weights are pruned. A `pattern` `(n, m)` settles `n` of every `m` neighbouring columns instead of all (`r * n // m` of a
    last group of `r`); `block` neighbouring columns are pruned together. The result does not depend on `rows_at_once`.
    Raises `ValueError` if blocks are combined with a projection or a pattern.
    """
    rows, width = weight.shape
    if block > 1 and (projection is not None or pattern is not None):
        raise ValueError("block > 1 cannot be combined with a projection or a pattern")
    weight, inverse = _padded(weight, inverse, -width % block)
    if rows_at_once is None:
        rows_at_once = max(1, BATCH_BYTES // (inverse.shape[-1] ** 2 * inverse.element_size()))
    parts, copies = [], _InverseCopies(min(rows, rows_at_once), inverse)
    for start in range(0, rows, rows_at_once):
        batch = slice(start, min(start + rows_at_once, rows))
        own = inverse if inverse.ndim == 2 else inverse[batch]
        parts.append(
            _Elimination(weight[batch], own, batch, projection or _zero_projection, pattern, block, copies).run()
        )
    order, losses, settled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return EliminationTrace(order, losses, settled[:, :width], block)


def _zero_projection(rows: slice, columns: Tensor) -> Criterion:
    return lambda weight, diagonal: (weight, weight.square().div_(diagonal))


@dataclass(frozen=True)
class GridProjection:
    """The projection of OBQ: weights are rounded to a fixed `grid`.

    The published outlier rule: if weights of a row are more than half a step from the grid, which happens only beyond its
    ends, the worst of them is next, unless a weight that is exactly zero is left. With `rank` (`[cols]`) the columns are
    settled by rising rank instead, in the same order in every row.
    """

    grid: Grid
    rank: Tensor | None = None

    def __call__(self, rows: slice, columns: Tensor) -> Criterion:
        args = self.grid.args
        group = columns // args.group_size if args.group_size else torch.zeros_like(columns)
        scale, zero = (
            parameter.expand(max(len(parameter), rows.stop), -1)[rows].gather(1, group)
            for parameter in (self.grid.scale, self.grid.zero)
        )
        rank = None if self.rank is None else self.rank.to(scale.dtype)[columns]
        limit = scale.square().mul_(0.25 * (1 + 1e-5))  # ties of a symmetric grid lie at half a step exactly

        def criterion(weight: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
            error = weight - encode(weight, scale, zero, args).sub_(zero).mul_(scale)
            if rank is not None:
                return error, rank.clone()
            squared = error.square()
            key = torch.where(squared > limit, -squared, squared / diagonal)
            return error, key.masked_fill_(weight == 0, torch.finfo(key.dtype).min)  # finite: infinity bars a block

        return criterion


class _Elimination:
    """The elimination of a batch of rows. Positions count the columns that are left in the copies of the inverse."""

    def __init__(
        self,
        weight: Tensor,
        inverse: Tensor,
        rows: slice,
        projection: Projection,
        pattern: tuple[int, int] | None,
        block: int,
        copies: "_InverseCopies",
    ) -> None:
        count, width = weight.shape
        self._rows, self._projection, self._block, self._copies = rows, projection, block, copies
        self._settled, self._weight = torch.empty_like(weight), weight.clone()
        self._inverse, self._own = inverse, False  # shared with the caller until the first panel ends
        self._done: list[Tensor] = []  # settled positions `[rows, 1]` that are still in the inverse
        self._values: list[Tensor] = []
        self._batch = torch.arange(count, device=weight.device)
        self._columns = torch.arange(width, device=weight.device).expand(count, -1)
        self._criterion = projection(rows, self._columns)
        self._diagonal = inverse.diagonal(dim1=-2, dim2=-1).expand(count, -1).clone()
        self._floor = self._diagonal * torch.finfo(weight.dtype).eps
        self._diagonal_blocks = _diagonal_blocks(inverse, block, count)
        self._unit = torch.eye(
            block, dtype=weight.dtype, device=weight.device
        )  # replaces the diagonal block of a settled block
        self._barred = weight.new_zeros(count, width // block)  # infinite for blocks that can no longer be chosen
        self._groups = None if pattern is None else _PatternGroups(pattern, count, width, weight.device)
        self._steps = width
        if self._groups is not None:
            self._steps = self._groups.total
            self._groups.bar_full(self._columns, self._barred)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order and losses `[rows, steps]` per block, settled weights `[rows, cols]`."""
        order = self._columns.new_empty(len(self._weight), self._steps // self._block, dtype=torch.int32)
        losses = self._weight.new_zeros(order.shape)
        start = 0
        while start < order.shape[1]:
            stop = min(start + max(PANEL // self._block, 1), order.shape[1])
            factor = self._panel(order[:, start:stop], losses[:, start:stop])
            if stop < order.shape[1]:
                self._update(factor)
            start = stop
        self._settled.scatter_(1, self._columns, self._weight)
        return order, losses, self._settled

    def _panel(self, order: Tensor, losses: Tensor) -> Tensor:
        """Settle one block per column of `order` and `losses` (views to be filled); returns the factor `U`."""
        factor = self._weight.new_empty(len(order), order.shape[1] * self._block, self._weight.shape[1])
        for index in range(order.shape[1]):
            errors, key = self._keys()
            chosen = key.add_(self._barred).argmin(1, keepdim=True)
            self._barred.scatter_(1, chosen, torch.inf)
            position = chosen * self._block
            column = self._columns.gather(1, position)
            order[:, index] = column.squeeze(1) // self._block
            if self._groups is not None:
                self._groups.take(column, self._columns, self._barred)
            for step in range(index * self._block, (index + 1) * self._block):
                error = errors.gather(1, position)
                self._done.append(position)
                self._values.append(self._weight.gather(1, position) - error)
                losses[:, index] += self._settle(position, error, factor, step)
                position = position + 1
        # Later steps change settled weights by rounding errors: the exact values are put back.
        self._weight.scatter_(1, torch.cat(self._done, dim=1), torch.cat(self._values, dim=1))
        return factor

    def _keys(self) -> tuple[Tensor, Tensor]:
        """What settling would subtract from each weight, and the key of each block."""
        if self._diagonal_blocks is None:
            return self._criterion(self._weight, self._diagonal)
        blocks = self._weight.unflatten(1, (-1, self._block))
        return self._weight, torch.linalg.solve(self._diagonal_blocks, blocks).mul_(blocks).sum(2)

    def _settle(self, position: Tensor, error: Tensor, factor: Tensor, step: int) -> Tensor:
        """Subtract `error` `[rows, 1]` from the weight at `position`, compensate, and store the step's row of the factor."""
        current = _rows_of(self._inverse, position)
        if step:
            past = factor[:, :step]
            taken = past.gather(2, position.unsqueeze(1).expand(-1, step, -1))
            current.baddbmm_(taken.view(-1, 1, step), past, alpha=-1)
        root = self._diagonal.gather(1, position).sqrt_()
        fresh = torch.div(current.squeeze(1), root, out=factor[:, step])
        scaled = error / root
        self._weight.addcmul_(fresh, scaled, value=-1)
        self._diagonal.addcmul_(fresh, fresh, value=-1)
        torch.maximum(self._diagonal, self._floor, out=self._diagonal).scatter_(1, position, 1.0)
        if self._diagonal_blocks is not None:
            parts = fresh.unflatten(1, (-1, self._block))
            self._diagonal_blocks.sub_(parts.unsqueeze(3) * parts.unsqueeze(2))
            self._diagonal_blocks[self._batch, position.squeeze(1) // self._block] = self._unit
        return scaled.square_().squeeze(1).div_(2)

    def _update(self, factor: Tensor) -> None:
        """Update the inverse: in a copy the first time, and in a copy without the settled columns once these are many."""
        if len(self._done) >= SHRINK * self._weight.shape[1]:
            keep = self._restrict(torch.cat(self._done, dim=1))
            self._own, self._done, self._values = True, [], []
            factor = factor.gather(2, keep.unsqueeze(1).expand(-1, factor.shape[1], -1))
        elif not self._own:
            self._inverse, self._own = self._copies.whole(self._inverse, len(factor)), True
        self._inverse.baddbmm_(factor.transpose(1, 2), factor, alpha=-1)

    def _restrict(self, settled: Tensor) -> Tensor:
        """Remove the positions `settled` `[rows, steps]` from every vector and from the inverse; returns those that stay."""
        self._settled.scatter_(1, self._columns, self._weight)
        gone = torch.zeros_like(self._weight, dtype=torch.uint8).scatter_(1, settled, 1)
        keep = gone.argsort(dim=1, stable=True)[:, : gone.shape[1] - settled.shape[1]]
        self._weight, self._diagonal, self._floor, self._columns = (
            vector.gather(1, keep) for vector in (self._weight, self._diagonal, self._floor, self._columns)
        )
        blocks = keep[:, :: self._block] // self._block
        self._barred = self._barred.gather(1, blocks)
        if self._diagonal_blocks is not None:
            self._diagonal_blocks = self._diagonal_blocks[self._batch.unsqueeze(1), blocks]
        self._criterion = self._projection(self._rows, self._columns)
        self._inverse = self._copies.submatrices(self._inverse, keep)
        return keep


class _InverseCopies:
    """Memory for the inverses of a batch of rows, reused: fresh pages would cost more than the arithmetic."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self._held = like.new_empty(rows * like.shape[-1] ** 2)
        self._part = like.new_empty(min(rows, ROWS_AT_ONCE) * like.shape[-1] ** 2)

    def whole(self, inverse: Tensor, rows: int) -> Tensor:
        """A copy of `inverse` for each of the `rows`."""
        return self._held[: rows * inverse.shape[-1] ** 2].view(rows, *inverse.shape[-2:]).copy_(inverse)

    def submatrices(self, inverse: Tensor, keep: Tensor) -> Tensor:
        """Rows and columns `keep` `[rows, l]` of `inverse` `[m, m]` or, row by row, `[rows, m, m]`.

        `inverse` may be in this memory: with a few rows at a time, nothing is overwritten before it is read, as copies shrink.
        """
        count, living = keep.shape
        small = self._held[: count * living * living].view(count, living, living)
        for start in range(0, count, ROWS_AT_ONCE):
            chosen = keep[start : start + ROWS_AT_ONCE]
            part = self._part[: len(chosen) * living * inverse.shape[-1]].view(len(chosen), living, -1)
            _rows_of(inverse if inverse.ndim == 2 else inverse[start : start + ROWS_AT_ONCE], chosen, out=part)
            columns = chosen.unsqueeze(1).expand(-1, living, -1)
            torch.gather(part, 2, columns, out=small[start : start + ROWS_AT_ONCE])
        return small


def _rows_of(matrix: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows `index` `[rows, k]` of one `matrix` `[m, m]` or of each row's own `[rows, m, m]`: `[rows, k, m]`."""
    width = matrix.shape[-1]
    if matrix.ndim == 3:
        index = index + torch.arange(0, len(index) * width, width, device=index.device).unsqueeze(1)
    flat = None if out is None else out.view(-1, width)
    return torch.index_select(matrix.reshape(-1, width), 0, index.flatten(), out=flat).view(*index.shape, width)


class _PatternGroups:
    """How many columns each group of `m` may still lose."""

    def __init__(self, pattern: tuple[int, int], rows: int, width: int, device: torch.device) -> None:
        zeros, self._size = pattern
        starts = torch.arange(0, width, self._size, device=device)
        room = (width - starts).clamp(max=self._size) * zeros // self._size
        self.total = int(room.sum())
        self._room = room.repeat(rows, 1)

    def bar_full(self, columns: Tensor, barred: Tensor) -> None:
        """Bar the groups that may not lose any column, such as a last group of a single column."""
        barred.masked_fill_(self._room.gather(1, columns // self._size) == 0, torch.inf)

    def take(self, column: Tensor, columns: Tensor, barred: Tensor) -> None:
        """Count `column` `[rows, 1]` as settled; bar the rest of its group once that is full."""
        group = column // self._size
        left = self._room.gather(1, group).sub_(1)
        self._room.scatter_(1, group, left)
        full = (columns // self._size == group) & (left == 0)
        barred.masked_fill_(full, torch.inf)


def _diagonal_blocks(inverse: Tensor, block: int, rows: int) -> Tensor | None:
    """The diagonal blocks `[rows, blocks, c, c]` of `inverse` `[m, m]`; None for single columns."""
    if block == 1:
        return None
    tiles = inverse.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [blocks, c, blocks, c]
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).repeat(rows, 1, 1, 1)


def _padded(weight: Tensor, inverse: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """Append `extra` zero columns that are independent of the others."""
    if not extra:
        return weight, inverse.contiguous()
    unit = torch.eye(extra, dtype=inverse.dtype, device=inverse.device)
    return torch.nn.functional.pad(weight, (0, extra)), torch.block_diag(inverse, unit)

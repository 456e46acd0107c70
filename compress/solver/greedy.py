"""Exact greedy elimination of the weights of every row, cheapest first: ExactOBS and OBQ (Frantar et al. 2022).

Every output row is its own problem with the same Hessian. Settling weight `p` of a row costs `e_p^2 / (2 [H^-1]_pp)`, moves
the others by `-H^-1[:, p] e_p / [H^-1]_pp`, and takes row and column `p` out of that row's inverse (Lemma 1 of the paper):
`H^-1 -= H^-1[:, p] H^-1[p, :] / [H^-1]_pp`.

Rows are worked on in batches, each row with its own copy of the inverse. The updates of a panel of steps are kept as a
factor `U` (the current inverse is `H^-1 - U^T U`, and a step needs one column of it only) and applied by one matrix
product; settled columns leave the copies as soon as they are a quarter of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..grid import Grid, encode

PANEL = 64  # columns settled per row before the copies of the inverse are updated
SHRINK = 0.75  # the share of living columns at which the dead ones are dropped
BATCH_BYTES = 2**26  # memory for the copies of the inverse

# (weights `[rows, m]`, diagonal of their inverse) -> (what settling removes from each, the key: the smallest is next)
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Target(Protocol):
    """What a settled weight becomes: the judge of the weights at `rows` and original `columns` `[rows, m]`."""

    def __call__(self, rows: slice, columns: Tensor) -> Judge: ...


@dataclass(frozen=True)
class Trace:
    """One run of `eliminate`: enough to read off every sparsity up to the one reached.

    order    int32 `[rows, steps]`: the blocks as they were settled (columns where `block` is 1)
    losses   `[rows, steps]`: what each step added to `1/2 tr((W-Q) H (W-Q)^T)`; not monotone along a row
    settled  `[rows, cols]`: the weights after the last step
    block    columns per block
    """

    order: Tensor
    losses: Tensor
    settled: Tensor
    block: int = 1

    def mask(self, sparsity: float) -> Tensor:
        """What is pruned, bool `[rows, cols]`, when the layer as a whole loses the share `sparsity` of its blocks.

        The `ceil(rows * blocks * sparsity)` smallest losses of all rows are counted per row, and a row loses so many of
        the blocks that it settled first (identity I5; what is counted and what is pruned differ, traces not being monotone).
        """
        total = math.ceil(self.losses.shape[0] * -(-self.settled.shape[1] // self.block) * sparsity)
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
    target: Target | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    block: int = 1,
    rows_at_once: int | None = None,
) -> Trace:
    """Settle the weights of every row of `weight` `[rows, cols]`, cheapest first, the others making up for each.

    `inverse` is `Hd^-1` `[cols, cols]`, or one per row `[rows, cols, cols]`, of the dtype of `weight`. `target` None prunes.
    A `pattern` `(n, m)` settles `n` of every `m` neighbouring columns instead of all (`r * n // m` of a last group of `r`);
    `block` neighbouring columns are pruned together. The result does not depend on `rows_at_once`.
    """
    rows, width = weight.shape
    if block > 1 and (target is not None or pattern is not None):
        raise ValueError("blocks are pruned as a whole: they take neither a grid nor a pattern")
    weight, inverse = _padded(weight, inverse, -width % block)
    if rows_at_once is None:
        rows_at_once = max(1, BATCH_BYTES // (inverse.shape[-1] ** 2 * inverse.element_size()))
    parts, copies = [], _Copies(min(rows, rows_at_once), inverse)
    for start in range(0, rows, rows_at_once):
        batch = slice(start, min(start + rows_at_once, rows))
        own = inverse if inverse.ndim == 2 else inverse[batch]
        parts.append(_Elimination(weight[batch], own, batch, target or _to_zero, pattern, block, copies).run())
    order, losses, settled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Trace(order, losses, settled[:, :width], block)


def _to_zero(rows: slice, columns: Tensor) -> Judge:
    return lambda weight, diagonal: (weight, weight.square().div_(diagonal))


@dataclass(frozen=True)
class ToGrid:
    """The target of OBQ: weights are rounded to `grid`, which was fixed before.

    The published outlier rule: where weights of a row are more than half a step from the grid, which they can only be
    after they drifted off its end, the worst of them is next, unless a weight that is exactly zero is still there.
    """

    grid: Grid

    def __call__(self, rows: slice, columns: Tensor) -> Judge:
        args = self.grid.args
        group = columns // args.group_size if args.group_size else torch.zeros_like(columns)
        scale, zero = (
            parameter.expand(max(len(parameter), rows.stop), -1)[rows].gather(1, group)
            for parameter in (self.grid.scale, self.grid.zero)
        )
        limit = scale.square().mul_(0.25 * (1 + 1e-5))  # ties of a symmetric grid lie at half a step exactly

        def judge(weight: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
            error = weight - encode(weight, scale, zero, args).sub_(zero).mul_(scale)
            squared = error.square()
            key = torch.where(squared > limit, -squared, squared / diagonal)
            return error, key.masked_fill_(weight == 0, -torch.inf)

        return judge


class _Elimination:
    """The elimination of a batch of rows. Positions count the columns that the copies of the inverse still hold."""

    def __init__(
        self,
        weight: Tensor,
        inverse: Tensor,
        rows: slice,
        target: Target,
        pattern: tuple[int, int] | None,
        block: int,
        copies: "_Copies",
    ) -> None:
        count, width = weight.shape
        self._rows, self._target, self._block, self._copies = rows, target, block, copies
        self._settled, self._weight = torch.empty_like(weight), weight.clone()
        self._inverse = copies.of(inverse, count)
        self._offset = torch.arange(count, device=weight.device)
        self._columns = torch.arange(width, device=weight.device).expand(count, -1)
        self._judge = target(rows, self._columns)
        self._diagonal = self._inverse.diagonal(dim1=1, dim2=2).clone()
        self._floor = self._diagonal * torch.finfo(weight.dtype).eps
        self._corners = _corners(self._inverse, block)
        self._unit = torch.eye(block, dtype=weight.dtype, device=weight.device)  # in place of a settled corner
        self._barred = weight.new_zeros(count, width // block)  # infinite where a block can no longer be chosen
        self._groups = None if pattern is None else _Groups(pattern, count, width, weight.device)
        self._steps = width if self._groups is None else self._groups.total
        self._dead: list[Tensor] = []  # positions settled but still held

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order and losses `[rows, steps]` per block, settled weights `[rows, cols]`."""
        order = self._columns.new_empty(len(self._weight), self._steps // self._block, dtype=torch.int32)
        losses = self._weight.new_zeros(order.shape)
        panel = max(1, PANEL // self._block)
        for start in range(0, order.shape[1], panel):
            self._panel(order[:, start : start + panel], losses[:, start : start + panel])
        self._settled.scatter_(1, self._columns, self._weight)
        return order, losses, self._settled

    def _panel(self, order: Tensor, losses: Tensor) -> None:
        """Settle one block per column of `order` and `losses` (views to be filled), then update the inverse at once."""
        width = self._weight.shape[1]
        factor = self._weight.new_empty(len(order), order.shape[1] * self._block, width)
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
                losses[:, index] += self._settle(position, errors.gather(1, position), factor, step)
                position = position + 1
        if width - len(self._dead) <= SHRINK * width:
            factor = self._drop_dead(factor)
        self._inverse.baddbmm_(factor.transpose(1, 2), factor, alpha=-1)

    def _keys(self) -> tuple[Tensor, Tensor]:
        """What settling would remove from each weight, and the key of each block."""
        if self._corners is None:
            return self._judge(self._weight, self._diagonal)
        blocks = self._weight.unflatten(1, (-1, self._block))
        return self._weight, torch.linalg.solve(self._corners, blocks).mul_(blocks).sum(2)

    def _settle(self, position: Tensor, error: Tensor, factor: Tensor, step: int) -> Tensor:
        """Take `error` `[rows, 1]` from the weight at `position`, compensate, and note the step's row of the factor."""
        width = self._weight.shape[1]
        current = self._inverse.view(-1, width).index_select(0, position.squeeze(1) + self._offset * width)
        if step:
            past = factor[:, :step]
            taken = past.gather(2, position.unsqueeze(1).expand(-1, step, -1))
            current.unsqueeze(1).baddbmm_(taken.transpose(1, 2), past, alpha=-1)
        root = self._diagonal.gather(1, position).sqrt_()
        fresh = torch.div(current, root, out=factor[:, step])
        scaled = error / root
        final = self._weight.gather(1, position).sub_(error)
        self._weight.addcmul_(fresh, scaled, value=-1).scatter_(1, position, final)
        self._diagonal.addcmul_(fresh, fresh, value=-1)
        torch.maximum(self._diagonal, self._floor, out=self._diagonal).scatter_(1, position, 1.0)
        if self._corners is not None:
            parts = fresh.unflatten(1, (-1, self._block))
            self._corners.sub_(parts.unsqueeze(3) * parts.unsqueeze(2))
            self._corners[self._offset, position.squeeze(1) // self._block] = self._unit
        self._dead.append(position)
        return scaled.square_().squeeze(1).div_(2)

    def _drop_dead(self, factor: Tensor) -> Tensor:
        """Drop the settled columns from every copy, every vector, and from `factor`, which is returned."""
        self._settled.scatter_(1, self._columns, self._weight)
        width = self._weight.shape[1]
        dead = torch.zeros_like(self._weight, dtype=torch.uint8).scatter_(1, torch.cat(self._dead, dim=1), 1)
        keep = dead.argsort(dim=1, stable=True)[:, : width - len(self._dead)]
        self._inverse = self._copies.submatrices(self._inverse, keep)
        self._weight, self._diagonal, self._floor, self._columns = (
            vector.gather(1, keep) for vector in (self._weight, self._diagonal, self._floor, self._columns)
        )
        blocks = keep[:, :: self._block] // self._block
        self._barred = self._barred.gather(1, blocks)
        if self._corners is not None:
            self._corners = self._corners[self._offset.unsqueeze(1), blocks]
        self._judge = self._target(self._rows, self._columns)
        self._dead = []
        return factor.gather(2, keep.unsqueeze(1).expand(-1, factor.shape[1], -1))


class _Copies:
    """Memory for the copies of the inverse, used again by every batch: fresh pages would cost more than the arithmetic."""

    def __init__(self, rows: int, like: Tensor) -> None:
        width = like.shape[-1]
        self._held, self._spare = (like.new_empty(rows * width * width) for _ in range(2))

    def of(self, inverse: Tensor, count: int) -> Tensor:
        """`count` copies of `inverse` `[m, m]`, or a copy of `[count, m, m]`."""
        width = inverse.shape[-1]
        return self._held[: count * width * width].view(count, width, width).copy_(inverse)

    def submatrices(self, inverse: Tensor, keep: Tensor) -> Tensor:
        """Rows and columns `keep` `[count, l]` of each of the copies `inverse` `[count, m, m]`, over which it writes."""
        count, width = inverse.shape[:2]
        living = keep.shape[1]
        rows = (keep + torch.arange(0, count * width, width, device=keep.device).unsqueeze(1)).flatten()
        tall = self._spare[: count * living * width].view(count * living, width)
        torch.index_select(inverse.view(-1, width), 0, rows, out=tall)
        index = keep.unsqueeze(1).expand(-1, living, -1)
        small = self._held[: count * living * living].view(count, living, living)
        return torch.gather(tall.view(count, living, width), 2, index, out=small)


class _Groups:
    """How many columns each group of `m` may still lose."""

    def __init__(self, pattern: tuple[int, int], rows: int, width: int, device: torch.device) -> None:
        zeros, self._size = pattern
        starts = torch.arange(0, width, self._size, device=device)
        room = (width - starts).clamp(max=self._size) * zeros // self._size
        self.total = int(room.sum())
        self._room = room.repeat(rows, 1)

    def take(self, column: Tensor, columns: Tensor, barred: Tensor) -> None:
        """Note that `column` `[rows, 1]` was settled; bar the rest of its group once that is full."""
        group = column // self._size
        left = self._room.gather(1, group).sub_(1)
        self._room.scatter_(1, group, left)
        full = (columns // self._size == group) & (left == 0)
        barred.masked_fill_(full, torch.inf)


def _corners(inverse: Tensor, block: int) -> Tensor | None:
    """The diagonal blocks `[rows, blocks, c, c]` of `inverse` `[rows, m, m]`; None for single columns."""
    if block == 1:
        return None
    tiles = inverse.unflatten(2, (-1, block)).unflatten(1, (-1, block))  # [rows, blocks, c, blocks, c]
    return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).clone()


def _padded(weight: Tensor, inverse: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """Append `extra` zero columns that are independent of the others."""
    if not extra:
        return weight, inverse
    width = weight.shape[1]
    larger = torch.eye(width + extra, dtype=inverse.dtype, device=inverse.device)
    larger = larger.expand(*inverse.shape[:-2], -1, -1).clone()
    larger[..., :width, :width] = inverse
    return torch.nn.functional.pad(weight, (0, extra)), larger

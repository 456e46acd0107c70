"""Least squares on a mask: the best values of the weights that are kept, given which ones are pruned.

Per row with kept columns `K` the minimum of `1/2 (w - q) Hd (w - q)^T` with `q = 0` outside `K` is
`q_K = (Hd_KK)^-1 Hd_K,: w` (identity I2), whichever method chose the mask: Wanda, SparseGPT, ExactOBS, a pattern.
"""

import torch
from torch import Tensor

BATCH_BYTES = 2**26  # memory for the sub-matrices of a batch of rows


def masked_lstsq(weight: Tensor, hessian: Tensor, pruned: Tensor, start: Tensor | None = None) -> Tensor:
    """The weights `[rows, cols]` that are zero where `pruned` (bool) and closest to `weight` by `hessian` elsewhere.

    `hessian` `[cols, cols]` is positive definite (damped); computed in its dtype, returned in that of `weight`. A row keeps the
    values of `start` (by default `weight` with the pruned entries zeroed) unless the solution has a smaller loss.
    """
    original = weight.to(hessian.dtype)
    start = original.masked_fill(pruned, 0) if start is None else start.to(hessian.dtype)
    solved = masked_solve(hessian, original @ hessian, ~pruned)
    better = row_losses(original - solved, hessian) < row_losses(original - start, hessian)
    return torch.where(better.unsqueeze(1), solved, start).to(weight.dtype)


def group_obs(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """The same optimum by group OBS, from the inverse: `w - w_P (Hd^-1_PP)^-1 Hd^-1_P,:`. Cheaper if little is pruned."""
    original = weight.to(inverse.dtype)
    moved = original - masked_solve(inverse, original, pruned) @ inverse
    return moved.masked_fill(pruned, 0).to(weight.dtype)


def row_losses(delta: Tensor, hessian: Tensor) -> Tensor:
    """`1/2 d H d^T` of every row `d` of `delta` `[rows, cols]`: `[rows]`."""
    return (delta @ hessian).mul_(delta).sum(1).div_(2)


def masked_solve(matrix: Tensor, right: Tensor, chosen: Tensor) -> Tensor:
    """Per row `r` with chosen set `S`: `x_S = (A_SS)^-1 r_S`, zero elsewhere. `A` `[n, n]` positive definite, `r` `[rows, n]`.

    Rows with equal sets share one factorisation; sets of similar size are factored together, padded with ones on the
    diagonal.
    """
    sets, owner = torch.unique(chosen, dim=0, return_inverse=True)
    sizes = sets.sum(1)
    order = sizes.argsort(stable=True)
    solution = torch.zeros_like(right)
    rows_of = _rows_by_owner(owner, len(sets))
    largest = int(sizes.max())
    step = max(1, BATCH_BYTES // (max(largest, 1) ** 2 * matrix.element_size()))
    for batch in order.split(step):
        size = int(sizes[batch[-1]])
        if size:
            _solve_batch(matrix, right, sets[batch], size, [rows_of[i] for i in batch.tolist()], solution)
    return solution


def _rows_by_owner(owner: Tensor, sets: int) -> list[Tensor]:
    counts = torch.bincount(owner, minlength=sets).tolist()
    return list(owner.argsort(stable=True).split(counts))


def _solve_batch(matrix: Tensor, right: Tensor, sets: Tensor, size: int, rows: list[Tensor], solution: Tensor) -> None:
    """Solve for the rows `rows[i]` of the sets `sets` `[batch, n]`, none larger than `size`, and fill in `solution`."""
    index = sets.byte().argsort(dim=1, descending=True, stable=True)[:, :size]
    valid = sets.gather(1, index)
    small = matrix[index.unsqueeze(2), index.unsqueeze(1)]
    small = small.mul_(valid.unsqueeze(2)).mul_(valid.unsqueeze(1))
    small.diagonal(dim1=1, dim2=2).add_((~valid).to(matrix.dtype))
    lower, failed = torch.linalg.cholesky_ex(small)
    lower[failed > 0] = torch.nan  # not a solution: `masked_lstsq` keeps the start instead
    longest = max(len(r) for r in rows)
    padded = torch.stack([torch.cat([r, r[:1].expand(longest - len(r))]) for r in rows])  # [batch, longest]
    values = right[padded].gather(2, index.unsqueeze(1).expand(-1, longest, -1)).mul_(valid.unsqueeze(1))
    solved = torch.cholesky_solve(values.transpose(1, 2), lower).transpose(1, 2)
    full = torch.zeros(*padded.shape, right.shape[1], dtype=right.dtype, device=right.device)
    full.scatter_(2, index.unsqueeze(1).expand(-1, longest, -1), solved.contiguous())
    solution[padded] = full

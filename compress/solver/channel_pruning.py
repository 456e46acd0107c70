"""Structured OBS: which input channels of a linear layer to remove, single columns or groups, and the refit of the others.

Removing a group `S` of columns costs `1/2 tr(W_S (Hd^-1_SS)^-1 W_S^T)`, the loss after all other columns have compensated it
(Optimal Brain Surgeon, Hassibi & Stork 1993, eq. 5, for groups; ExactOBS's group form summed over rows).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .damped_hessian import DampedHessian

DAMPING = 0.01  # relative to the mean of the diagonal


def channels_to_remove(weight: Tensor, hessian: DampedHessian, size: int, count: int) -> Tensor:
    """Choose `count` groups of `size` neighbouring columns of `weight` `[out, in]` to remove: bool `[in // size]`.

    One group at a time, always the cheapest, with weight and inverse updated after each. Float64, of the Hessian's size.
    """
    left, inverse = weight.double().masked_fill(hessian.dead, 0), hessian.inverse.clone()
    removed = torch.zeros(left.shape[1] // size, dtype=torch.bool, device=left.device)
    for _ in range(count):
        costs = group_costs(left, inverse, size).masked_fill(removed, torch.inf)
        group = int(costs.argmin())
        removed[group] = True
        span = slice(group * size, (group + 1) * size)
        solution = torch.linalg.solve(inverse[span, span], inverse[span])  # [size, in]
        left -= left[:, span] @ solution
        inverse -= inverse[:, span] @ solution
        left[:, span] = 0
        inverse[span], inverse[:, span] = 0, 0
        inverse.diagonal()[span] = 1  # an arbitrary value that keeps removed groups solvable
    return removed


def group_costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """`1/2 tr(W_S (A_SS)^-1 W_S^T)` of all groups of `size` columns: weight `[out, in]`, `A` `[in, in]`, costs `[groups]`."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal() / 2
    groups = weight.shape[1] // size
    corners = torch.stack([inverse[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])
    columns = weight.T.unflatten(0, (groups, size))  # [groups, size, out]
    return (torch.linalg.solve(corners, columns) * columns).sum((1, 2)) / 2


def refit_channels(weight: Tensor, hessian: DampedHessian, removed: Tensor) -> Tensor:
    """`weight` `[out, in]` float64: zero in the columns `removed` (bool `[in]`), the least squares solution in the others."""
    target, kept = weight.double().masked_fill(hessian.dead, 0), ~removed
    solved = torch.zeros_like(target)
    factor = torch.linalg.cholesky(hessian.matrix[kept][:, kept])
    solved[:, kept] = torch.cholesky_solve((target @ hessian.matrix[:, kept]).T, factor).T
    return solved


def shared_channels_to_remove(
    readers: Sequence[tuple[Tensor, DampedHessian]], fixed: Sequence[Tensor], count: int
) -> Tensor:
    """Choose `count` channels of the residual stream to remove, always the one that costs all readers least: bool `[channels]`.

    A reader is the Gram matrix `W^T W` `[channels, channels]` of its weights and the Hessian of its input; it compensates every
    channel (the loss of `channels_to_remove` with groups of one). A `fixed` reader cannot, and loses `1/2 sum_ij M_ij` over
    the removed channels. Each loss counts relative to the energy of the reader's output. Float64.
    """
    states = [(g.clone(), h.inverse.clone(), float((g * h.matrix).sum()) / 2) for g, h in readers]
    fixed = [matrix.double() / matrix.double().sum() for matrix in fixed]
    size = len(states[0][0])
    removed = torch.zeros(size, dtype=torch.bool, device=states[0][0].device)
    for _ in range(count):
        costs = sum(g.diagonal() / a.diagonal() / 2 / total for g, a, total in states)
        costs = costs + sum(m.diagonal() + 2 * m[:, removed].sum(1) for m in fixed)
        channel = int(torch.as_tensor(costs).masked_fill(removed, torch.inf).argmin())
        removed[channel] = True
        for gram, inverse, _ in states:
            _drop(gram, inverse, channel)
    return removed


def _drop(gram: Tensor, inverse: Tensor, channel: int) -> None:
    """Remove `channel`: `W <- W (I - e a^T)` with `a = A_c / A_cc`, applied to `W^T W`, and `A` without row and column."""
    solution = inverse[channel] / inverse[channel, channel]
    column = gram[:, channel].clone()
    gram += (
        column[channel] * torch.outer(solution, solution)
        - torch.outer(solution, column)
        - torch.outer(column, solution)
    )
    inverse -= torch.outer(inverse[:, channel].clone(), solution)
    inverse[channel], inverse[:, channel] = 0, 0
    inverse[channel, channel] = 1  # an arbitrary value that keeps the costs finite


def refit_gain(hessian: Tensor, weight: Tensor, removed: Tensor) -> Tensor:
    """Factors `[kept]` of the channels that stay, for a reader whose `weight` `[out, in]` cannot change.

    Least squares of `sum_K s_i x_i W_i` against `sum x_i W_i`, regularized towards 1 by the usual damping.
    """
    loss = hessian.double() * (weight.double().T @ weight.double())
    kept = ~removed
    matrix = loss[kept][:, kept]
    shift = DAMPING * matrix.diagonal().mean()
    right = loss[kept].sum(1) + shift
    return torch.linalg.solve(matrix + shift * torch.eye(len(matrix)).to(matrix), right)

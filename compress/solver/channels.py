"""Which input channels a linear layer can lose, whole columns or groups of them, and what the others make of it.

Structured OBS: a group `S` of columns costs `1/2 tr(W_S (Hd^-1_SS)^-1 W_S^T)`, the loss after all other columns have moved to
make up for it (Optimal Brain Surgeon, Hassibi & Stork 1993, eq. 5, for groups; ExactOBS's group form summed over rows).
"""

import torch
from torch import Tensor

from .damped import Damped


def remove_channels(weight: Tensor, hessian: Damped, size: int, count: int) -> Tensor:
    """`count` groups of `size` neighbouring columns of `weight` `[out, in]` that go one by one: bool `[in // size]`.

    Each time the cheapest group goes; weight and inverse follow. Float64, of the Hessian's size.
    """
    left, inverse = weight.double().masked_fill(hessian.dead, 0), hessian.inverse.clone()
    gone = torch.zeros(left.shape[1] // size, dtype=torch.bool, device=left.device)
    for _ in range(count):
        costs = group_costs(left, inverse, size).masked_fill(gone, torch.inf)
        group = int(costs.argmin())
        gone[group] = True
        span = slice(group * size, (group + 1) * size)
        answer = torch.linalg.solve(inverse[span, span], inverse[span])  # [size, in]
        left -= left[:, span] @ answer
        inverse -= inverse[:, span] @ answer
        left[:, span] = 0
        inverse[span], inverse[:, span] = 0, 0
        inverse.diagonal()[span] = 1  # of no meaning: keeps the groups that went solvable
    return gone


def group_costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """`1/2 tr(W_S (A_SS)^-1 W_S^T)` of all groups of `size` columns: weight `[out, in]`, `A` `[in, in]`, costs `[groups]`."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal() / 2
    groups = weight.shape[1] // size
    corners = torch.stack([inverse[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])
    columns = weight.T.unflatten(0, (groups, size))  # [groups, size, out]
    return (torch.linalg.solve(corners, columns) * columns).sum((1, 2)) / 2


def refit_channels(weight: Tensor, hessian: Damped, gone: Tensor) -> Tensor:
    """`weight` `[out, in]` float64 with the columns `gone` (bool `[in]`) at zero and the least squares answer in the others."""
    target, kept = weight.double().masked_fill(hessian.dead, 0), ~gone
    solved = torch.zeros_like(target)
    factor = torch.linalg.cholesky(hessian.matrix[kept][:, kept])
    solved[:, kept] = torch.cholesky_solve((target @ hessian.matrix[:, kept]).T, factor).T
    return solved

"""The damped Hessian as a matrix with its inverse: what the methods that prune and the refits solve against."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .factor import inverse_factor


@dataclass(frozen=True)
class Damped:
    """A positive definite Hessian in float64 `[in, in]`.

    matrix   the Hessian with ones on the diagonal of dead columns, plus `damping * mean(diag) * I`
    inverse  of `matrix`
    upper    `U` with `inverse = U^T U`
    dead     bool `[in]`: columns whose inputs were all zero; their weights do nothing and are zeroed first
    damping  relative to the mean of the diagonal, as needed rather than as asked
    """

    matrix: Tensor
    inverse: Tensor
    upper: Tensor
    dead: Tensor
    damping: float


def damped(hessian: Tensor, damping: float) -> Damped:
    """Fix the dead columns of `hessian` `[in, in]` (any float dtype) and damp it until it can be inverted."""
    hessian = hessian.double()
    dead = hessian.diagonal() <= 0
    hessian = hessian + torch.diag(dead.to(hessian.dtype))
    factor = inverse_factor(hessian, damping)
    inverse = factor.upper.T @ factor.upper
    if factor.floored:  # eigenvalues were raised: no multiple of the identity tells the matrix
        return Damped(torch.linalg.inv(inverse), inverse, factor.upper, dead, factor.damping)
    matrix = hessian + factor.damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return Damped(matrix, inverse, factor.upper, dead, factor.damping)

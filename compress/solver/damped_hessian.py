"""The damped Hessian with its inverse, which pruning methods and least-squares refits use."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .factor import inverse_factor


@dataclass(frozen=True)
class DampedHessian:
    """A positive definite Hessian in float64 `[in, in]`.

    matrix   the Hessian with ones on the diagonal of dead columns, plus `damping * mean(diag) * I`
    inverse  of `matrix`
    upper    `U` with `inverse = U^T U`
    energy   `[in]`: the diagonal of the Hessian as it was, twice the mean square of each input
    dead     bool `[in]`: columns whose inputs were all zero; their weights have no effect and are zeroed first
    damping  relative to the mean of the diagonal, after any increase
    """

    matrix: Tensor
    inverse: Tensor
    upper: Tensor
    energy: Tensor
    dead: Tensor
    damping: float


def damp(hessian: Tensor, damping: float) -> DampedHessian:
    """Fix the dead columns of `hessian` `[in, in]` (any float dtype) and increase `damping` until it can be inverted."""
    hessian = hessian.double()
    energy = hessian.diagonal().clone()
    dead = energy <= 0
    hessian = hessian + torch.diag(dead.to(hessian.dtype))
    factor = inverse_factor(hessian, damping)
    inverse = factor.upper.T @ factor.upper
    shift = factor.damping * hessian.diagonal().mean()
    # Raised eigenvalues (a last resort) do not add a multiple of the identity: the matrix follows from the inverse.
    matrix = torch.linalg.inv(inverse) if factor.floored else hessian + shift * torch.eye(len(hessian)).to(hessian)
    return DampedHessian(matrix, inverse, factor.upper, energy, dead, factor.damping)

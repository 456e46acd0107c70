"""The factor that every column sweep needs: upper `U` with `Hd^-1 = U^T U` of the damped Hessian `Hd`."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Damping grows by this factor until the Cholesky factorisation succeeds, up to the mean diagonal itself.
ESCALATION, LARGEST_DAMPING = 10.0, 1.0
# Below this order a plain triangular solve beats further splitting, and a strip's zeros are worth multiplying.
LEAF = 256
STRIP = 2**20  # elements that are reversed at a time


@dataclass(frozen=True)
class Factor:
    """`upper` `[n, n]`: row-major `U`; `damping`: the relative damping that was needed; `floored`: eigenvalues were raised."""

    upper: Tensor
    damping: float
    floored: bool = False


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Factor:
    """Factor `hessian + damping * mean(diag) * I` `[n, n]`; the damping is increased until this is positive definite.

    `order` int64 `[n]` permutes rows and columns: column `i` of the factor stands for column `order[i]` of `hessian`.

    Never fails on a finite symmetric matrix: if even the largest damping does not suffice, eigenvalues are raised to it.
    """
    mean = hessian.diagonal().mean()
    backwards = torch.arange(len(hessian), device=hessian.device).flip(0) if order is None else order.flip(0)
    while True:
        lower = _reversed_cholesky(hessian, backwards, damping * mean)
        if lower is not None:
            return Factor(_reverse_(triangular_inverse_(lower)), damping)
        if damping >= LARGEST_DAMPING:
            return Factor(_floored(hessian, backwards, damping * mean), damping, floored=True)
        damping = min(max(damping * ESCALATION, 1e-6), LARGEST_DAMPING)


def upper_times_(upper: Tensor, columns: Tensor) -> Tensor:
    """`U columns` in place of `columns` `[n, rows]`: by strips of `U`, without most of its zeros."""
    for s in _strips(upper):
        columns[s] = upper[s, s.start :] @ columns[s.start :]
    return columns


def transposed_times_(upper: Tensor, columns: Tensor) -> Tensor:
    """`U^T columns` in place of `columns` `[n, rows]`."""
    for s in reversed(_strips(upper)):
        columns[s] = upper[: s.stop, s].T @ columns[: s.stop]
    return columns


def solve_upper_(upper: Tensor, columns: Tensor) -> Tensor:
    """`U^-1 columns` in place of `columns` `[n, rows]`: substitution from the last strip up, all by matrix products."""
    for s in reversed(_strips(upper)):
        rest = columns[s].addmm_(upper[s, s.stop :], columns[s.stop :], alpha=-1)
        corner = upper[s, s].T.clone(memory_format=torch.contiguous_format)
        columns[s] = triangular_inverse_(corner).T @ rest
    return columns


def _strips(upper: Tensor) -> list[slice]:
    return [slice(start, min(start + LEAF, len(upper))) for start in range(0, len(upper), LEAF)]


def _reversed_cholesky(hessian: Tensor, backwards: Tensor, shift: Tensor) -> Tensor | None:
    """Lower Cholesky factor of `J (H + shift I) J` with `J` the reversal of the order, or None if it is not positive definite.

    `U = J chol(J H J)^-1 J`: one factorisation and one triangular inverse instead of Cholesky, inverse, Cholesky. The
    matrices are large, so one copy, permuted and reversed, becomes the factor in place.
    """
    matrix = hessian[backwards.unsqueeze(1), backwards]
    matrix.diagonal().add_(shift)
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, info))  # LAPACK's order of storage: no copy is made
    if info.item() or not matrix.diagonal().isfinite().all() or matrix.diagonal().min() <= 0:
        return None
    return matrix


def _floored(hessian: Tensor, backwards: Tensor, floor: Tensor) -> Tensor:
    """The factor after raising every eigenvalue of `hessian` to at least `floor` (or to one if all vanish)."""
    values, vectors = torch.linalg.eigh(hessian.double())
    least = floor.double() if floor > 0 else torch.ones((), dtype=torch.float64)
    raised = (vectors * values.clamp(min=least)) @ vectors.T
    lower = torch.linalg.cholesky(raised[backwards.unsqueeze(1), backwards]).contiguous()
    return _reverse_(triangular_inverse_(lower)).to(hessian.dtype)


def _reverse_(matrix: Tensor) -> Tensor:
    """Reverse the rows and the columns of a contiguous `matrix` in place."""
    flat = matrix.view(-1)
    for start in range(0, middle := flat.numel() // 2, STRIP):
        stop = min(start + STRIP, middle)
        front, back = flat[start:stop], flat[flat.numel() - stop : flat.numel() - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return matrix


def triangular_inverse_(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix `[n, n]` in place, by halves: almost all work is matrix products."""
    n = lower.shape[0]
    if n <= LEAF:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
    half = n // 2
    top, bottom, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    triangular_inverse_(top)
    triangular_inverse_(bottom)
    torch.mm(bottom @ corner, top, out=corner).neg_()
    return lower

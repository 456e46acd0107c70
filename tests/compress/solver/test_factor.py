"""The inverse-Hessian factor against plain float64 linear algebra."""

import pytest
import torch

from lmpress.compress.solver.factor import inverse_factor, triangular_inverse_


def spd(n: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    return x.T @ x / tokens


@pytest.mark.parametrize("n", [1, 2, 63, 257, 600])
def test_upper_factor_reproduces_the_inverse(n: int) -> None:
    hessian = spd(n, 2 * n + 3)
    factor = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.allclose(factor.upper.T @ factor.upper @ damped, torch.eye(n, dtype=torch.float64), atol=1e-9)


def test_float32_factor_is_as_good_as_the_textbook_route() -> None:
    hessian = spd(512, 2000)
    exact = inverse_factor(hessian, 0.01).upper
    ours = inverse_factor(hessian.float(), 0.01).upper.double()
    damped = hessian.float() + 0.01 * hessian.float().diagonal().mean() * torch.eye(512)
    textbook = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).double()
    assert (ours - exact).norm() <= 1.5 * (textbook - exact).norm()
    assert (ours - exact).norm() / exact.norm() < 1e-4


def test_triangular_inverse_in_place() -> None:
    lower = torch.linalg.cholesky(spd(530, 1000))
    expected = torch.linalg.inv(lower)
    assert triangular_inverse_(lower) is lower
    assert torch.allclose(lower, expected, atol=1e-9)


def test_rank_deficient_hessian_escalates_until_it_factors() -> None:
    hessian = spd(64, 8).float()
    assert inverse_factor(hessian, 0.01).damping == 0.01
    escalated = inverse_factor(hessian, 0.0)
    assert 0 < escalated.damping <= 1.0
    assert escalated.upper.isfinite().all()


def test_indefinite_matrix_gets_an_eigenvalue_floor() -> None:
    matrix = torch.diag(torch.tensor([4.0, -9.0, 1.0]))
    factor = inverse_factor(matrix, 0.01)
    assert factor.floored
    assert factor.upper.isfinite().all()
    assert (factor.upper.diagonal() > 0).all()


def test_zero_matrix_still_factors() -> None:
    assert inverse_factor(torch.zeros(3, 3), 0.01).upper.isfinite().all()

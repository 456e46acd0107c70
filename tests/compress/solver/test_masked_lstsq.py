"""Least squares on a mask against a row-by-row solve, and against group OBS from the inverse."""

import pytest
import torch
from torch import Tensor

from lmpress.compress.solver.damped_hessian import damp
from lmpress.compress.solver.masked_lstsq import group_obs, masked_lstsq, row_losses


def problem(rows: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(2 * width + 4, width, generator=generator, dtype=torch.float64)
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), inputs.T @ inputs


def row_by_row(weight: Tensor, hessian: Tensor, pruned: Tensor) -> Tensor:
    result = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = ~pruned[row]
        result[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row])
    return result


def masks(rows: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    random = torch.rand(rows, width, generator=generator) < 0.5
    ragged = torch.rand(rows, width, generator=generator) < torch.rand(rows, 1, generator=generator)
    ragged[0], ragged[-1] = True, False
    same = random[:1].repeat(rows, 1)
    few = random[torch.arange(rows) % 3]
    return {"random": random, "ragged": ragged, "same": same, "few": few}


@pytest.mark.parametrize("name", ["random", "ragged", "same", "few"])
def test_masked_lstsq_and_group_obs_are_the_optimum(name: str) -> None:
    weight, hessian = problem(23, 31)
    pruned = masks(23, 31)[name]
    expected = row_by_row(weight, hessian, pruned)
    assert torch.allclose(masked_lstsq(weight, hessian, pruned), expected, atol=1e-10)
    assert torch.allclose(group_obs(weight, torch.linalg.inv(hessian), pruned), expected, atol=1e-8)


def test_small_batches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(23, 31)
    pruned = masks(23, 31)["ragged"]
    whole = masked_lstsq(weight, hessian, pruned)
    monkeypatch.setattr("lmpress.compress.solver.masked_lstsq.BATCH_BYTES", 31 * 31 * 8 * 2)
    assert torch.allclose(masked_lstsq(weight, hessian, pruned), whole, atol=1e-12)


def test_never_worse_than_the_start() -> None:
    """A Hessian that cannot be factored must leave the rows unchanged."""
    weight, hessian = problem(5, 8)
    pruned = torch.zeros(5, 8, dtype=torch.bool)
    pruned[:, 3] = True
    broken = hessian - 2 * hessian.diagonal().max() * torch.eye(8, dtype=torch.float64)
    start = weight.masked_fill(pruned, 0)
    assert torch.equal(masked_lstsq(weight, broken, pruned), start)
    optimum = masked_lstsq(weight, hessian, pruned)
    assert torch.equal(masked_lstsq(weight, hessian, pruned, start=optimum), optimum)
    assert (row_losses(weight - optimum, hessian) < row_losses(weight - start, hessian)).all()


def test_float32_weights_stay_float32() -> None:
    weight, hessian = problem(3, 10)
    pruned = masks(3, 10)["random"]
    assert masked_lstsq(weight.float(), hessian, pruned).dtype == torch.float32


def test_the_parts_of_a_damped_hessian() -> None:
    _, hessian = problem(2, 6)
    hessian[4], hessian[:, 4] = 0, 0
    found = damp(hessian.float(), 0.01)
    assert found.dead.tolist() == [False] * 4 + [True, False]
    assert found.energy[4] == 0 and found.matrix[4, 4] > 1
    assert torch.allclose(found.inverse @ found.matrix, torch.eye(6, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(found.upper.T @ found.upper, found.inverse)


def test_damping_rises_until_the_inverse_exists() -> None:
    inputs = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    found = damp(inputs.T @ inputs, 0.0)
    assert found.damping > 0
    assert (torch.linalg.eigvalsh(found.matrix) > 0).all()

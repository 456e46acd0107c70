"""SparseGPT against the textbook, its bookkeeping (identity I1), and its count of zeros."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lmpress.compress.methods.prune import sparsegpt
from lmpress.compress.solver.damped_hessian import damp
from lmpress.compress.solver.masked_lstsq import row_losses
from lmpress.compress.solver.sweep import sweep
from lmpress.errors import UsageError
from lmpress.recipes.scheme import PruneArgs
from lmpress.recipes.scheme.prune_args import Pruning, block_zeros

Layer = Callable[[int, int, int], tuple[Tensor, Tensor]]


def textbook_sparsegpt(weight: Tensor, upper: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """SparseGPT as printed: masks from the updated weights, one column after another, full updates."""
    weight, width = weight.clone(), weight.shape[1]
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(width):
        if pattern is None and j % 128 == 0:
            scores = weight[:, j : j + 128] ** 2 / upper.diagonal()[j : j + 128] ** 2
            threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
            mask[:, j : j + 128] = scores <= threshold
        if pattern is not None and j % pattern[1] == 0:
            scores = weight[:, j : j + pattern[1]] ** 2 / upper.diagonal()[j : j + pattern[1]] ** 2
            mask[:, j : j + pattern[1]].scatter_(1, scores.argsort(1)[:, : pattern[0]], True)
        settled = weight[:, j].masked_fill(mask[:, j], 0)
        error = (weight[:, j] - settled) / upper[j, j]
        weight[:, j:] -= torch.outer(error, upper[j, j:])
        weight[:, j] = settled
    return weight


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
def test_it_equals_the_textbook(pattern: str | None, layer: Layer) -> None:
    weight, x = (tensor.double() for tensor in layer(20, 296, 700))
    hessian, args = damp(2 * x.T @ x, 0.01), PruneArgs(0.5, pattern=pattern)
    found, pruned = sparsegpt.prune(weight, hessian, args)
    expected = textbook_sparsegpt(weight, hessian.upper, 0.5, args.n_of_m)
    assert torch.equal(pruned, expected == 0)
    assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_the_errors_of_the_sweep_are_the_change(
    pattern: str | None, dtype: torch.dtype, tolerance: float, layer: Layer
) -> None:
    """Identity I1 in both precisions."""
    weight, x = layer(16, 150, 500)
    weight, x = weight.to(dtype), x.double()
    hessian = damp(2 * x.T @ x, 0.01)
    upper, columns = hessian.upper.to(dtype), weight.T.contiguous()
    projection = sparsegpt.ZeroProjection(upper.diagonal(), PruneArgs(0.5, pattern=pattern), columns)
    errors = sweep(columns, upper, projection)
    delta = weight - columns.T
    assert (delta - errors.T @ upper).norm() <= tolerance * delta.norm()
    loss = float(row_losses(delta.double(), hessian.matrix).sum())
    assert float(errors.double().square().sum()) / 2 == pytest.approx(loss, rel=tolerance)


def test_it_prunes_hardly_more_than_asked(layer: Layer, prune: Callable[..., Any]) -> None:
    assert block_zeros(128 * 10, 0.5) == 641
    found = prune("sparsegpt", *layer(10, 128, 300), PruneArgs(0.0)).result
    assert int((~found.kept).sum()) == 1  # the threshold itself goes, as published


def test_a_budget_per_row_is_refused() -> None:
    with pytest.raises(UsageError, match="supports only the scope block"):
        sparsegpt.SparseGPT(scheme=Pruning(PruneArgs(scope="row")))

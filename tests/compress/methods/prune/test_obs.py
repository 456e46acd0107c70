"""OBS in blocks of columns: between the diagonal and ExactOBS, which it is with one block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lmpress.compress.methods.prune import exactobs, obs
from lmpress.compress.solver.damped_hessian import damp
from lmpress.compress.solver.masked_lstsq import row_losses
from lmpress.errors import UsageError
from lmpress.recipes.scheme import PruneArgs
from lmpress.recipes.scheme.prune_args import Pruning

Layer = Callable[[int, int, int], tuple[Tensor, Tensor]]


def test_in_one_block_it_is_nearly_exactobs(layer: Layer) -> None:
    weight, x = (tensor.double() for tensor in layer(6, 40, 300))
    hessian = damp(2 * x.T @ x, 0.0)
    whole, small = (obs.prune(weight, hessian, PruneArgs(0.5), block)[0] for block in (40, 10))
    exact = exactobs.prune(weight, hessian, PruneArgs(0.5))[0]
    losses = [float(row_losses(weight - q, hessian.matrix).sum()) for q in (exact, whole, small)]
    assert losses[0] <= losses[1] * 1.02 and losses[1] <= losses[0] * 1.1
    assert losses[1] < losses[2]


def test_one_weight_by_the_formula(layer: Layer) -> None:
    """The deleted weight has the least `w^2 / (2 [H^-1]_qq)`, and the others of its row move by the published step."""
    weight, x = (tensor.double() for tensor in layer(5, 12, 100))
    hessian = damp(2 * x.T @ x, 0.0)
    found, pruned = obs.prune(weight, hessian, PruneArgs(1 / 60), 12)
    inverse = torch.linalg.inv(2 * x.T @ x)
    row, column = divmod(int((weight.square() / inverse.diagonal()).argmin()), 12)
    assert pruned.nonzero().tolist() == [[row, column]]
    expected = weight.clone()
    expected[row] -= weight[row, column] / inverse[column, column] * inverse[column]
    assert torch.allclose(found, expected, atol=1e-9)


def test_weights_of_other_blocks_do_not_move(layer: Layer) -> None:
    weight, x = (tensor.double() for tensor in layer(3, 16, 100))
    hessian = damp(2 * x.T @ x, 0.0)
    weight[:, 8:] *= 1000  # nothing of the second block goes
    found, pruned = obs.prune(weight, hessian, PruneArgs(0.25), 8)
    assert not pruned[:, 8:].any() and int(pruned.sum()) == 12
    assert torch.equal(found[:, 8:], weight[:, 8:])


@pytest.mark.parametrize("bad", [{"block": 0}, {"scheme": Pruning(PruneArgs(scope="block"))}], ids=str)
def test_options_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        obs.OBS(**bad)

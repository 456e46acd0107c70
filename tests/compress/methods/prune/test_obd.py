"""OBD as a pass: the saliency by its formula, and what it shares with Wanda."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmpress.compress.methods.prune import obd
from lmpress.compress.solver.damped_hessian import damp
from lmpress.recipes.scheme import PruneArgs
from lmpress.recipes.scheme.prune_args import layer_zeros

Layer = Callable[[int, int, int], tuple[Tensor, Tensor]]


def test_it_ranks_the_weights_of_a_row_as_wanda_does(layer: Layer, prune: Callable[..., Any]) -> None:
    weight, x = layer(8, 16, 90)
    found = prune("obd", weight, x, PruneArgs(0.5, scope="row")).result
    assert torch.equal(found.kept, prune("wanda", weight, x, PruneArgs(0.5)).result.kept)


def test_all_weights_of_the_layer_compete_by_the_saliency(layer: Layer) -> None:
    weight, x = layer(8, 16, 90)
    hessian = damp(2 * x.T.double() @ x.double(), 0.0)
    scores = (weight.double() ** 2 * x.double().square().sum(0)).flatten()
    expected = set(scores.argsort()[: layer_zeros(8 * 16, 0.5)].tolist())
    pruned = obd.prune(weight.double(), hessian, PruneArgs(0.5))[1]
    assert set(pruned.flatten().nonzero().flatten().tolist()) == expected


def test_the_saliency_is_the_loss_of_deleting_one_weight_of_a_diagonal_hessian() -> None:
    weight, diagonal = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([2.0, 0.5, -4.0])
    assert obd.saliency(weight, diagonal).tolist() == [[1.0, 1.0, 0.0]]  # a negative curvature counts as none

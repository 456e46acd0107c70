"""Magnitude pruning against a sort of all weights; what it needs follows its options."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lmpress.compress.methods.prune.magnitude import Magnitude
from lmpress.recipes.methods import Needs
from lmpress.recipes.scheme import PruneArgs

Layer = Callable[[int, int, int], tuple[Tensor, Tensor]]


def test_the_smallest_weights_go_and_the_others_stay_as_they_are(layer: Layer, prune: Callable[..., Any]) -> None:
    weight, x = layer(10, 30, 100)
    found = prune("magnitude", weight, x, PruneArgs(0.3)).result
    threshold = weight.abs().flatten().sort().values[90]
    assert torch.equal(found.kept, weight.abs() >= threshold)
    assert torch.equal(found.values[found.kept], weight[found.kept])


@pytest.mark.parametrize("scope", ["row", "block"])
def test_weights_compete_inside_the_scope(scope: Any, layer: Layer, prune: Callable[..., Any]) -> None:
    weight, x = layer(6, 256, 20)
    weight[:, :128] *= 1e6
    weight[:3] *= 1e6
    found = prune("magnitude", weight, x, PruneArgs(0.5, scope=scope)).result
    gone = ~found.kept
    if scope == "row":
        assert (gone.sum(1) == 128).all()
    else:
        assert gone[:, :128].sum() == gone[:, 128:].sum() == 6 * 64 + 1
    # With the whole layer as scope, none of the largest go.
    assert prune("magnitude", weight, x, PruneArgs(0.5)).result.kept[:3, :128].all()


def test_only_the_refit_needs_statistics() -> None:
    assert Magnitude().needs == Needs()
    assert Magnitude(refit=True).needs == Needs(hessian=True)

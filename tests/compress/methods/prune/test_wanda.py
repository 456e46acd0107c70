"""Wanda against its formula, row by row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmpress.compress.block import Block, Linear
from lmpress.compress.methods.prune import wanda
from lmpress.errors import UsageError
from lmpress.recipes.scheme import PruneArgs, QuantArgs

Layer = Callable[[int, int, int], tuple[Tensor, Tensor]]


def test_every_row_by_the_formula(layer: Layer, prune: Callable[..., Any]) -> None:
    weight, x = layer(10, 31, 100)
    found = prune("wanda", weight, x, PruneArgs(0.5)).result
    scores = weight.abs().double() * x.double().square().sum(0).sqrt()
    for row in range(10):
        gone = sorted(range(31), key=lambda j: float(scores[row, j]))[: int(31 * 0.5)]
        assert set((~found.kept[row]).nonzero().flatten().tolist()) == set(gone)
    assert torch.equal(found.values[found.kept], weight[found.kept])  # nothing is updated


def test_with_equal_norms_it_is_magnitude_per_row(layer: Layer, prune: Callable[..., Any]) -> None:
    weight, _ = layer(8, 16, 1)
    found = prune("wanda", weight, torch.eye(16), PruneArgs(0.5)).result
    by_size = prune("magnitude", weight, torch.eye(16), PruneArgs(0.5, scope="row")).result
    assert torch.equal(found.kept, by_size.kept)


def test_a_layer_that_is_to_be_quantized_is_refused(layer: Layer, statistic: Callable[[Tensor], Any]) -> None:
    weight, x = layer(4, 8, 20)
    linear = Linear("layer", weight, QuantArgs(), statistic(x))
    with pytest.raises(UsageError, match="to be quantized"):
        wanda.apply(wanda.Wanda(), Block("block", nn.Identity(), [linear]))

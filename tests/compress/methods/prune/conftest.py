"""What the tests of pruning methods share: layers with correlated inputs, and running one method on one layer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lmpress.calibrate.statistics.hessian import Hessian
from lmpress.compress.block import Block, Linear
from lmpress.recipes.methods import method
from lmpress.recipes.scheme import PruneArgs
from lmpress.recipes.scheme.prune_args import Pruning

Layer = Callable[[int, int, int], tuple[Tensor, Tensor]]
Prune = Callable[..., Linear]


@pytest.fixture
def layer() -> Layer:
    """Gives a weight `[rows, width]` and `tokens` inputs `[tokens, width]` whose channels are correlated and of many sizes."""

    def make(rows: int, width: int, tokens: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
        inputs = torch.randn(tokens, width, generator=generator) @ mixing
        inputs *= torch.rand(width, generator=generator).mul(2).exp()
        return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)), inputs

    return make


@pytest.fixture
def statistic() -> Callable[[Tensor], Hessian]:
    """Gives the Hessian that inputs `[tokens, width]` have as a statistic."""

    def collect(inputs: Tensor) -> Hessian:
        hessian = Hessian(inputs.shape[1], torch.float64)
        hessian.update(inputs, sequences=1)
        return hessian

    return collect


@pytest.fixture
def prune(statistic: Callable[[Tensor], Hessian]) -> Prune:
    """Gives the layer that a method leaves, run with `options` on a weight and its inputs."""

    def run(name: str, weight: Tensor, inputs: Tensor, args: PruneArgs, **options: object) -> Linear:
        known = method(name)
        resolved = args.for_layer(weight.shape[1], torch.float32, known.scope)
        linear = Linear("layer", weight, resolved, statistic(inputs))
        known.apply(known.config(scheme=Pruning(args), **options), Block("block", nn.Identity(), [linear]))
        return linear

    return run

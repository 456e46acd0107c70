"""Blocks prepared for a transform: weights, calibration batches and the input of the experiments."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from lmpress.calibrate.model.architecture import find_linears, weight_of
from lmpress.compress.block import Block, BlockContext, Linear
from lmpress.recipes.scheme import Scheme


@pytest.fixture
def prepare(record) -> Callable[..., Block]:
    """Gives block `index` of a model with linears under a scheme; `outliers` are channels whose norm gains are raised."""

    def run(
        model: PreTrainedModel, scheme: Scheme, index: int = 0, outliers: tuple[int, ...] = (), factor: float = 30.0
    ):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                    for channel in outliers:
                        parameter[channel] *= factor
        module, call, hidden = record(model, index)
        module = module.requires_grad_(False)
        generator = torch.Generator().manual_seed(9)
        batches = [(call, torch.randn(hidden.shape, generator=generator), None) for _ in range(2)]
        linears = [
            Linear(f"b.{name}", weight_of(m), scheme.weights.for_width(weight_of(m).shape[1]), inputs=scheme.inputs)
            for name, m in find_linears(module).items()
        ]
        trial = call, torch.randn(hidden.shape, generator=generator)
        return Block("b", module, linears, BlockContext(lambda: iter(batches), trial, {}, 8))

    return run


def block_output(block: Block) -> torch.Tensor:
    """The outputs of the block on its calibration batches."""
    return torch.cat([call.replay(block.module, hidden) for call, hidden, _ in block.context.samples()])


@pytest.fixture
def output() -> Callable[[Block], torch.Tensor]:
    return block_output

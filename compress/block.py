"""The one plug-in point: a method is one file that defines a config dataclass and `apply(config, block)`.

The config's fields are the method's options (`--set name=value`, YAML keys, keyword arguments). `apply` reads the weights
and statistics of `block.linears` and leaves a compressed tensor and its figures in each.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..calibrate.runner import BlockIO, Call
from ..calibrate.statistics.collect import HeldOut
from ..calibrate.statistics.drift import Drift
from ..calibrate.statistics.hessian import Hessian
from ..errors import UsageError
from ..kernels.tensor import Compressed
from ..recipes.scheme import PruneArgs, QuantArgs, WeightArgs


@dataclass
class Linear:
    """One linear layer while it is being compressed. `weight` is float32 `[out, in]` whatever the module's layout.

    It is the module's own, and with it becomes what a pass has made of it, unless a pass needs the `original`.
    """

    name: str
    weight: Tensor
    args: WeightArgs  # resolved for this layer
    hessian: Hessian | None = None
    drift: Drift | None = None
    held_out: HeldOut | None = None  # of the held-out tokens, which `hessian` and `drift` include
    result: Compressed | None = None
    figures: dict[str, float | int | str] = field(default_factory=dict)
    inputs: QuantArgs | None = None  # of the activations that it reads

    @property
    def grid_args(self) -> QuantArgs:
        """`args` of a layer that is to be quantized. Raises `UsageError` for one that is to be pruned."""
        if isinstance(self.args, QuantArgs):
            return self.args
        raise UsageError(f"{self.name} is to be pruned, not quantized", "the last pass of a recipe decides")

    @property
    def prune_args(self) -> PruneArgs:
        """`args` of a layer that is to be pruned. Raises `UsageError` for one that is to be quantized."""
        if isinstance(self.args, PruneArgs):
            return self.args
        raise UsageError(f"{self.name} is to be quantized, not pruned", "the last pass of a recipe decides")


@dataclass(frozen=True)
class BlockContext:
    """What a transform of a block works with.

    samples    gives the calibration batches anew: how the block is called, hidden states `[rows, length, width]`, token mask
    trial      a call of the block on tiny random rows, and hidden states for it
    dtypes     in what dtype the checkpoint stores a tensor of the block, by its name inside the block
    head_size  width of an attention head
    """

    samples: Callable[[], Iterator[tuple[Call, Tensor, Tensor | None]]]
    trial: tuple[Call, Tensor]
    dtypes: Mapping[str, torch.dtype]
    head_size: int


@dataclass
class Block:
    """One decoder block: its module (weights in place), the linears of this stage, and its inputs where they were asked for."""

    name: str
    module: nn.Module
    linears: list[Linear]
    context: BlockContext | None = None
    io: BlockIO | None = None
    seed: int = 0  # the recipe's: of whatever a pass chooses at random

    def local(self) -> dict[str, Linear]:
        """The linears by their names inside the block."""
        return {linear.name.removeprefix(f"{self.name}."): linear for linear in self.linears}

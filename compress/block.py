"""What a method works on: `apply(config, block)` reads the weights and statistics of `block.linears`.

It leaves a compressed tensor and its figures in each linear; a transform changes the weights of `block.module` instead.
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

DECIDES = "the last pass of a recipe determines whether layers are quantized or pruned"


@dataclass
class Linear:
    """One linear layer while it is being compressed.

    name     the full name of the module
    weight   float32 `[out, in]`, also if the module stores its transpose. It is the module's own tensor and changes with every
             pass, unless a pass needs the `original`: then it is a copy of what the first compressing pass started from
    args     the weight arguments, resolved for this layer
    hessian  of its inputs, and their `drift` from the original model's inputs; None unless the pass needs them
    held_out Hessian and drift of the held-out tokens, which `hessian` and `drift` include too
    result   what the pass leaves
    figures  what the report lists about the layer
    inputs   how its inputs are quantized
    """

    name: str
    weight: Tensor
    args: WeightArgs
    hessian: Hessian | None = None
    drift: Drift | None = None
    held_out: HeldOut | None = None
    result: Compressed | None = None
    figures: dict[str, float | int | str] = field(default_factory=dict)
    inputs: QuantArgs | None = None

    @property
    def grid_args(self) -> QuantArgs:
        """`args` of a layer that is quantized. Raises `UsageError` if it is pruned."""
        if isinstance(self.args, QuantArgs):
            return self.args
        raise UsageError(f"{self.name} is to be pruned, not quantized", DECIDES)

    @property
    def prune_args(self) -> PruneArgs:
        """`args` of a layer that is pruned. Raises `UsageError` if it is quantized."""
        if isinstance(self.args, PruneArgs):
            return self.args
        raise UsageError(f"{self.name} is to be quantized, not pruned", DECIDES)


@dataclass(frozen=True)
class BlockContext:
    """What a transform reads of a block.

    samples    iterates over the calibration batches, from the start at every call: the arguments of the block, hidden states
               `[rows, length, width]`, token mask
    trial      a call of the block on tiny random rows, and hidden states for it
    dtypes     the dtype in which the checkpoint stores a tensor of the block, by its name inside the block
    head_size  width of an attention head
    """

    samples: Callable[[], Iterator[tuple[Call, Tensor, Tensor | None]]]
    trial: tuple[Call, Tensor]
    dtypes: Mapping[str, torch.dtype]
    head_size: int


@dataclass
class Block:
    """One decoder block.

    name     the full name of the module
    module   the block, with its weights
    linears  its linears, or with `true_sequential` those of one stage: linears with a common input
    context  for a pass that needs `samples` or a `trial`
    io       for a pass that needs `block_io`
    seed     the recipe's, for random choices
    """

    name: str
    module: nn.Module
    linears: list[Linear]
    context: BlockContext | None = None
    io: BlockIO | None = None
    seed: int = 0

    def local(self) -> dict[str, Linear]:
        """The linears by their names inside the block."""
        return {linear.name.removeprefix(f"{self.name}."): linear for linear in self.linears}

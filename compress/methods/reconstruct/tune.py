"""Learned block tuning: codes, scales and zeros are trained until the block reproduces the output of the original block.

A quantizer solves layer by layer; attention and the activation function between the layers are not part of its objective.
Here they are: the block with quantized weights and the compressed model's hidden states as input is trained towards the
full-precision output. AutoRound (Cheng et al. 2023) does this from round-to-nearest, with signs of straight-through
gradients. This method starts from the result of the pass before it, uses soft rounding that hardens (as AdaRound, Nagel et
al. 2020, but codes may move further than to a neighbour), trains scales and zeros too, and has the original model's hidden
states as target. The format of the checkpoint does not change.
"""

from typing import ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch.optim import Adam

from ....errors import UsageError
from ...block import Block
from .loop import Target, check_softness, learnable_quantizers, original_outputs, reconstruct, record_figures


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Tune:
    """Options of block tuning. Rates are Adam's initial learning rates; they decrease to zero.

    steps       number of training steps per block; a batch has about 1024 tokens
    rate        of the rounding offsets, in steps of the grid
    scale_rate  of the scales, relative; 0: scales are not trained
    zero_rate   of the zeros, in steps of the grid; 0: zeros are not trained
    soft, hard  softness of the rounding at the start and at the end (see learnable.py); `soft` 0: straight-through gradients
    target      target of the block's output: the original model's hidden states (`stream`), so that errors of earlier blocks
                are compensated as far as possible, or the original block's output for the same inputs (`block`)
    """

    steps: int = 300
    rate: float = 0.02
    scale_rate: float = 0.003
    zero_rate: float = 0.005
    soft: float = 0.2
    hard: float = 0.005
    target: Literal["stream", "block"] = "stream"
    needs: ClassVar[frozenset[str]] = frozenset({"block_io"})
    scheme: ClassVar[None] = None
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, got {self.steps}", "use a number such as 300")
        if min(self.rate, self.scale_rate, self.zero_rate) < 0 or not self.rate:
            raise UsageError(
                "tune requires rate above 0 and scale_rate and zero_rate of at least 0, "
                f"got {self.rate}, {self.scale_rate} and {self.zero_rate}",
                "use rate=0.02",
            )
        check_softness(self.soft, self.hard)


def apply(config: Tune, block: Block) -> None:
    """Train every quantized linear of the block together."""
    assert block.io is not None
    quantizers = learnable_quantizers(block)
    if not quantizers:  # every layer of the block is kept dense
        return
    stretches = [quantizer.stretch for quantizer in quantizers.values() if not quantizer.rows_share_a_scale]
    zeros = [
        quantizer.zero for quantizer in quantizers.values() if quantizer.has_zeros and not quantizer.rows_share_a_scale
    ]
    groups = [
        ([quantizer.offset for quantizer in quantizers.values()], config.rate),
        (stretches, config.scale_rate),
        (zeros, config.zero_rate),
    ]
    optimiser = Adam(
        [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters and rate], betas=(0.9, 0.99)
    )
    inputs = block.io.reference if config.target == "stream" else block.io.inputs
    target = Target(block.io.inputs, original_outputs(block.io, inputs), (config.soft, config.hard))
    record_figures(block, reconstruct(block, quantizers, target, optimiser, config.steps))

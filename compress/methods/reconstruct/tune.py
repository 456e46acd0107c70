"""Learned block tuning: rounding, scales and zeros move until the block gives what the original model's block gives.

A quantizer solves layer by layer; attention and the activation function between the layers are no part of its objective.
Here they are: a block with quantized weights, fed what the compressed model feeds it, is trained towards the full-precision
output. AutoRound (Cheng et al. 2023) does so from round-to-nearest, by the signs of gradients that pass straight through the
rounding. This starts from the solution of the pass before it, rounds softly and ever harder (as AdaRound, Nagel et al. 2020,
though codes may go further than to a neighbour), moves scales and zeros as well, and aims at the original model's stream. The
format of the checkpoint does not change.
"""

from typing import ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch.optim import Adam

from ....errors import UsageError
from ....recipes.methods import Method, Needs
from ....recipes.scheme.kind_names import GRID
from ...block import Block
from .loop import Target, check_softness, learnable_quantizers, reconstruct, record, targets


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Tune:
    """Options of block tuning. Rates are those of Adam at the start; they fall to zero.

    steps       batches of about 1024 tokens that every block is trained on
    rate        of the rounding offsets, in steps of the grid
    scale_rate  of the scales, relative; 0 leaves them
    zero_rate   of the zeros, in steps of the grid; 0 leaves them
    soft, hard  how softly codes are rounded at the start and at the end; 0 rounds straight through
    target      what the block aims at: the output of the original model (`stream`), errors made before it repaired as far as
                it can, or that of the original block on the same inputs (`block`)
    """

    steps: int = 300
    rate: float = 0.02
    scale_rate: float = 0.003
    zero_rate: float = 0.005
    soft: float = 0.2
    hard: float = 0.005
    target: Literal["stream", "block"] = "stream"
    needs: ClassVar[Needs] = Needs(block_io=True)
    scheme: ClassVar[None] = None
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps {self.steps} is not positive", "use a number such as 300")
        if min(self.rate, self.scale_rate, self.zero_rate) < 0 or not self.rate:
            raise UsageError("a learning rate is negative, or that of the offsets is 0", "use rate=0.02")
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
    source = block.io.reference if config.target == "stream" else block.io.inputs
    target = Target(block.io.inputs, targets(block.io, source), (config.soft, config.hard))
    record(block, reconstruct(block, quantizers, target, optimiser, config.steps))


METHOD = Method(Tune, apply, kinds=frozenset({GRID}))

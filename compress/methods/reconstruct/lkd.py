"""Layer-by-layer knowledge distillation (ZeroQuant, Yao et al. 2022): each block alone learns to imitate the original one.

The student reads the original model's hidden states, not those of the compressed blocks before it, so blocks are
independent and one optimiser state at a time is in memory. The weights behind the codes are trained by AdamW through the
rounding; the grid stays as the quantizer fitted it, and so do norms and biases, which are stored as in the original.
"""

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch.optim import AdamW

from ....errors import UsageError
from ....recipes.methods import Method, Needs
from ....recipes.scheme.kind_names import GRID
from ...block import Block
from .loop import Target, check_softness, learnable_quantizers, reconstruct, record, targets


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LKD:
    """Options of LKD, for use after any quantizer.

    steps       batches of about 1024 tokens that every block is trained on
    rate        AdamW's at the start, in units of the weights; it falls to zero. ZeroQuant uses 5e-6, too little here
    soft, hard  how softly codes are rounded at the start and at the end (see quantizer.py); `soft` 0 rounds straight through,
                as published
    """

    steps: int = 200
    rate: float = 5e-4
    soft: float = 0.2
    hard: float = 0.005
    needs: ClassVar[Needs] = Needs(block_io=True)
    scheme: ClassVar[None] = None
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rate <= 0:
            raise UsageError("lkd needs steps and a rate above 0", "use steps=200 and rate=5e-4")
        check_softness(self.soft, self.hard)


def apply(config: LKD, block: Block) -> None:
    """Train the weights of the block's quantized linears together."""
    assert block.io is not None
    quantizers = learnable_quantizers(block, in_weights=True)
    if not quantizers:  # every layer of the block is kept dense
        return
    # Weight decay would draw the trained change, not the weight, towards zero; at this rate it is nothing either way.
    optimiser = AdamW([quantizer.offset for quantizer in quantizers.values()], lr=config.rate, weight_decay=0.0)
    target = Target(block.io.reference, targets(block.io, block.io.reference), (config.soft, config.hard))
    record(block, reconstruct(block, quantizers, target, optimiser, config.steps))


METHOD = Method(LKD, apply, kinds=frozenset({GRID}))

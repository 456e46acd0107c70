"""Layer-by-layer knowledge distillation (LKD; ZeroQuant, Yao et al. 2022): each block is trained on its own to reproduce the
output of the original block.

The block reads the original model's hidden states, not those of the compressed blocks before it. So blocks are independent,
and only one optimiser state is in memory. AdamW trains the weights before rounding; the grid, norms and biases do not change.
"""

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch.optim import AdamW

from ....errors import UsageError
from ...block import Block
from .loop import Target, check_softness, learnable_quantizers, original_outputs, reconstruct, record_figures


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LKD:
    """Options of LKD, for use after any quantizer.

    steps       number of training steps per block; a batch has about 1024 tokens
    rate        initial learning rate of AdamW, in units of the weights; it decreases to zero. ZeroQuant uses 5e-6, which is
                too low here
    soft, hard  softness of the rounding at the start and at the end (see learnable.py); `soft` 0: straight-through gradients,
                as published
    """

    steps: int = 200
    rate: float = 5e-4
    soft: float = 0.2
    hard: float = 0.005
    needs: ClassVar[frozenset[str]] = frozenset({"block_io"})
    scheme: ClassVar[None] = None
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rate <= 0:
            raise UsageError(
                f"lkd requires steps and rate above 0, got steps={self.steps} and rate={self.rate}",
                "use steps=200 and rate=5e-4",
            )
        check_softness(self.soft, self.hard)


def apply(config: LKD, block: Block) -> None:
    """Train the weights of the block's quantized linears together."""
    assert block.io is not None
    quantizers = learnable_quantizers(block, in_weights=True)
    if not quantizers:  # every layer of the block is kept dense
        return
    # Weight decay would act on the change of the weight, not on the weight; at this rate it has no effect either way.
    optimiser = AdamW([quantizer.offset for quantizer in quantizers.values()], lr=config.rate, weight_decay=0.0)
    target = Target(block.io.reference, original_outputs(block.io, block.io.reference), (config.soft, config.hard))
    record_figures(block, reconstruct(block, quantizers, target, optimiser, config.steps))

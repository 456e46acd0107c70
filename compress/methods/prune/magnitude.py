"""Magnitude pruning: the smallest weights become zero. The baseline of all other methods; only the refit needs calibration."""

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....kernels.tensor import PrunedTensor
from ....recipes.scheme import PruneArgs
from ....recipes.scheme.prune_args import Pruning, Scope
from ...block import Block
from ...solver.damped_hessian import DampedHessian
from .layers import prune_linears, record
from .masks import smallest


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Magnitude:
    """Options of magnitude pruning.

    refit    least-squares refit of the weights that are kept, which needs calibration
    damping  of the Hessian that the refit solves against, relative to the mean of its diagonal
    """

    scheme: Pruning = Pruning()
    refit: bool = False
    damping: float = 0.01
    scope: ClassVar[Scope] = "layer"
    true_sequential: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Only the refit needs statistics."""
        return frozenset({"hessian"} if self.refit else ())


def apply(config: Magnitude, block: Block) -> None:
    """Prune every linear of the block."""
    if config.refit:
        prune_linears(block, config.damping, prune, refitted=True)
        return
    for linear in block.linears:
        args = linear.prune_args
        linear.result = PrunedTensor.of(linear.weight, smallest(linear.weight.abs(), args), args)
        record(linear)


def prune(weight: Tensor, hessian: DampedHessian, args: PruneArgs) -> tuple[Tensor, Tensor]:
    """Zero the smallest entries of `weight` `[out, in]`."""
    pruned = smallest(weight.abs(), args)
    return weight.masked_fill(pruned, 0), pruned

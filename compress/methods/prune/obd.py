"""Optimal Brain Damage (LeCun, Denker, Solla 1990): prune by the saliency `h_kk w_k^2 / 2`, the diagonal of the Hessian.

As a pass, the Hessian is that of each layer's own output error, so that `h_kk` is the input's energy and the ranking inside a
row is Wanda's; here all weights of the layer compete. `networks.py` prunes any network by the diagonal of its own loss.
"""

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....recipes.scheme import PruneArgs
from ....recipes.scheme.prune_args import Pruning, Scope
from ...block import Block
from ...solver.damped_hessian import DampedHessian
from .layers import prune_linears
from .masks import smallest


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OBD:
    """Options of OBD.

    refit    least-squares refit of the weights that are kept
    damping  of the Hessian that the refit solves against, relative to the mean of its diagonal
    """

    scheme: Pruning = Pruning()
    refit: bool = False
    damping: float = 0.01
    true_sequential: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    scope: ClassVar[Scope] = "layer"


def apply(config: OBD, block: Block) -> None:
    """Prune every linear of the block."""
    prune_linears(block, config.damping, prune, config.refit)


def prune(weight: Tensor, hessian: DampedHessian, args: PruneArgs) -> tuple[Tensor, Tensor]:
    """Zero the least salient entries of `weight` `[out, in]`."""
    pruned = smallest(saliency(weight, hessian.energy.expand_as(weight)), args)
    return weight.masked_fill(pruned, 0), pruned


def saliency(weight: Tensor, diagonal: Tensor) -> Tensor:
    """`h_kk w_k^2 / 2`; negative second derivatives, which occur away from a minimum, count as 0."""
    return diagonal.clamp(min=0) * weight.square() / 2

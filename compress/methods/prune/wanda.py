"""Wanda (Sun et al. 2023): prune by `|w_ij| * ||x_j||`, in every output row by itself; the kept weights do not change."""

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
class Wanda:
    """Options of Wanda.

    refit    least-squares refit of the weights that are kept, which beats SparseGPT's update on the same layer
    damping  of the Hessian that the refit solves against, relative to the mean of its diagonal
    """

    scheme: Pruning = Pruning()
    refit: bool = False
    damping: float = 0.01
    true_sequential: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    scope: ClassVar[Scope] = "row"


def apply(config: Wanda, block: Block) -> None:
    """Prune every linear of the block; the statistics are those of the dense block after pruned ones."""
    prune_linears(block, config.damping, prune, config.refit)


def prune(weight: Tensor, hessian: DampedHessian, args: PruneArgs) -> tuple[Tensor, Tensor]:
    """Zero the smallest scores of `weight` `[out, in]`, with undamped norms."""
    pruned = smallest(weight.abs() * hessian.energy.sqrt(), args)
    return weight.masked_fill(pruned, 0), pruned

"""Optimal Brain Surgeon (Hassibi, Stork 1993): delete the weight that costs least and compensate it with the others.

`L_q = w_q^2 / (2 [H^-1]_qq)`, `dw = -(w_q / [H^-1]_qq) H^-1 e_q`. As a pass it works on each layer's own output error, whose
Hessian is cut into diagonal blocks of neighbouring columns (with one block for all columns it is ExactOBS). `networks.py`
has the method for small networks, by the Hessian of their own loss.
"""

from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....errors import UsageError
from ....recipes.scheme import PruneArgs
from ....recipes.scheme.prune_args import Pruning, Scope
from ...block import Block
from ...solver.damped_hessian import DampedHessian
from ...solver.masked_lstsq import group_obs
from ...solver.obs_elimination import eliminate
from .layers import prune_linears
from .masks import smallest


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OBS:
    """Options of OBS.

    block    columns whose weights compensate each other (50 to 100 in the literature of block-diagonal Fishers)
    damping  added to the Hessian's diagonal, relative to its mean; raised tenfold while it cannot be inverted
    """

    scheme: Pruning = Pruning()
    block: int = 64
    damping: float = 0.001
    true_sequential: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    scope: ClassVar[Scope] = "layer"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError(f"block must be at least 1, got {self.block}", "use 64")
        if self.scheme.weights.scope == "block":
            raise UsageError("OBS does not support the scope block", "use scope layer or row")


def apply(config: OBS, block: Block) -> None:
    """Prune every linear of the block."""
    prune_linears(block, config.damping, lambda weight, hessian, args: prune(weight, hessian, args, config.block))


def prune(weight: Tensor, hessian: DampedHessian, args: PruneArgs, block: int) -> tuple[Tensor, Tensor]:
    """Eliminate inside blocks of columns of `weight` `[out, in]`, then choose among the steps of all blocks together."""
    starts = range(0, weight.shape[1], block)
    order = torch.empty_like(weight)  # the loss of the step that settled each weight, made monotone along every block
    parts = []
    for start in starts:
        span = slice(start, start + block)
        inverse = torch.linalg.inv(hessian.matrix[span, span])
        trace = eliminate(weight[:, span], inverse)
        order[:, span] = torch.empty_like(trace.losses).scatter_(1, trace.order.long(), trace.losses.cummax(1).values)
        parts.append(inverse)
    pruned = smallest(order, args)
    return _compensated(weight, parts, pruned, block), pruned


def _compensated(weight: Tensor, inverses: list[Tensor], pruned: Tensor, block: int) -> Tensor:
    """Group OBS inside every block."""
    spans = zip(weight.split(block, 1), inverses, pruned.split(block, 1), strict=True)
    return torch.cat([group_obs(part, inverse, mask) for part, inverse, mask in spans], dim=1)

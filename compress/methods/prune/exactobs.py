"""ExactOBS (Frantar et al. 2022): exact Optimal Brain Surgeon on every row of a layer, one budget for all rows.

The elimination gives an order and the loss of every step, from which the mask of any sparsity follows; the weights are the
least squares solution on the mask, which equals the result of the elimination (identity I2) without its rounding errors.
Costs `O(in^3)` per row: for layers of up to some thousand columns; for larger ones use `sparsegpt` with `refit`.
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
from ...solver.masked_lstsq import masked_lstsq, row_losses
from ...solver.obs_elimination import eliminate
from . import sparsegpt
from .layers import prune_linears

DOUBLE_WIDTH = 512  # up to this width the order is computed in float64, whose cost is small there


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ExactOBS:
    """Options of ExactOBS.

    damping          added to the Hessian's diagonal, relative to its mean; raised tenfold while it cannot be inverted
    true_sequential  collect the statistics of each linear after the linears before it in the block are pruned
    compare          with a pattern: rows whose loss is lower on SparseGPT's mask use that mask (not in the paper, whose greedy
                     choice can be poor inside the groups)
    drift            share of the error of earlier layers that a layer compensates, 0 (as published) to 1
    """

    scheme: Pruning = Pruning()
    damping: float = 0.001
    true_sequential: bool = True
    compare: bool = True
    drift: float = 1.0
    scope: ClassVar[Scope] = "layer"
    blocks: ClassVar[bool] = True  # patterns 1xc

    def __post_init__(self) -> None:
        if self.scheme.weights.scope == "block":
            raise UsageError("ExactOBS does not support the scope block", "use scope layer or row")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics to collect."""
        return frozenset({"hessian", "drift"} if self.drift else {"hessian"})


def apply(config: ExactOBS, block: Block) -> None:
    """Prune every linear of the block."""

    def chosen(weight: Tensor, hessian: DampedHessian, args: PruneArgs) -> tuple[Tensor, Tensor]:
        return prune(weight, hessian, args, config.compare)

    prune_linears(block, config.damping, chosen, drift=config.drift)


def prune(weight: Tensor, hessian: DampedHessian, args: PruneArgs, compare: bool = True) -> tuple[Tensor, Tensor]:
    """Eliminate, choose the mask, solve on it: `weight` `[out, in]` float64."""
    dtype = torch.float64 if weight.shape[1] <= DOUBLE_WIDTH else torch.float32
    trace = eliminate(weight.to(dtype), hessian.inverse.to(dtype), pattern=args.n_of_m, block=args.block)
    if args.n_of_m is not None:
        pruned = trace.first(trace.order.shape[1])
        if compare:
            pruned = _better_rows(weight, hessian.matrix, pruned, sparsegpt.prune(weight, hessian, args)[1])
    elif args.scope == "row":
        pruned = trace.first(int(weight.shape[1] // args.block * args.sparsity))
    else:
        pruned = trace.mask(args.sparsity)
    return masked_lstsq(weight, hessian.matrix, pruned), pruned


def _better_rows(weight: Tensor, matrix: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """For each row, the mask with the smaller loss after least squares."""
    losses = [row_losses(weight - masked_lstsq(weight, matrix, mask), matrix) for mask in (first, second)]
    return torch.where((losses[1] < losses[0]).unsqueeze(1), second, first)

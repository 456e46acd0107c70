"""ExactOBS (Frantar et al. 2022): exact Optimal Brain Surgeon on every row of a layer, one budget for all rows.

The elimination gives an order and the loss of every step; mask and weights of any sparsity follow, the weights by least
squares on the mask, which is what the elimination itself converges to (identity I2) without its rounding errors.
Costs `O(in^3)` per row: for layers up to some thousand columns; `sparsegpt` with `refit` is for the larger ones.
"""

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....errors import UsageError
from ....recipes.methods import Method, Needs
from ....recipes.scheme import PruneArgs
from ....recipes.scheme.kind_names import PRUNED
from ....recipes.scheme.prune_args import Pruning
from ...block import Block
from ...solver.damped_hessian import DampedHessian
from ...solver.masked_lstsq import refit, row_losses
from ...solver.obs_elimination import eliminate
from . import sparsegpt
from .layers import prune_linears

DOUBLE_WIDTH = 512  # up to this width the order is found in float64, whose cost does not matter there


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ExactOBS:
    """Options of ExactOBS.

    damping          added to the Hessian's diagonal, relative to its mean; raised tenfold while it cannot be inverted
    true_sequential  gather the statistics of each linear after the linears before it in the block were pruned
    compare          with a pattern: rows whose loss is lower on SparseGPT's mask take that one (not in the paper, whose greedy
                     choice can get stuck inside the groups)
    drift            how much of what the layers before it broke a layer makes up for, 0 (as published) to 1
    """

    scheme: Pruning = Pruning()
    damping: float = 0.001
    true_sequential: bool = True
    compare: bool = True
    drift: float = 1.0

    def __post_init__(self) -> None:
        if self.scheme.weights.scope == "block":
            raise UsageError("ExactOBS spends one budget on a layer or on each row", "use scope layer or row")

    @property
    def needs(self) -> Needs:
        """The statistics to gather."""
        return Needs(hessian=True, drift=bool(self.drift))


def apply(config: ExactOBS, block: Block) -> None:
    """Prune every linear of the block."""

    def chosen(weight: Tensor, hessian: DampedHessian, args: PruneArgs) -> tuple[Tensor, Tensor]:
        return prune(weight, hessian, args, config.compare)

    prune_linears(block, config.damping, chosen, drift=config.drift)


def prune(weight: Tensor, hessian: DampedHessian, args: PruneArgs, compare: bool = True) -> tuple[Tensor, Tensor]:
    """Eliminate, choose, solve: `weight` `[out, in]` float64."""
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
    return refit(weight, hessian.matrix, pruned), pruned


def _better_rows(weight: Tensor, matrix: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Row by row the mask on which least squares leaves the smaller loss."""
    losses = [row_losses(weight - refit(weight, matrix, mask), matrix) for mask in (first, second)]
    return torch.where((losses[1] < losses[0]).unsqueeze(1), second, first)


METHOD = Method(ExactOBS, apply, kinds=frozenset({PRUNED}), scheme=Pruning(), prunes_blocks=True)

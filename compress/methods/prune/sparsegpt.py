"""SparseGPT (Frantar, Alistarh 2023): GPTQ's column sweep with zeros in place of codes.

The mask is chosen during the sweep, from the compensated weights: for 128 columns at a time over all rows jointly, or, for a
pattern `n:m`, per row at every m-th column. The score is `w^2 / d_j^2` with `d` the diagonal of the Cholesky factor.
"""

from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....errors import UsageError
from ....recipes.scheme import PruneArgs
from ....recipes.scheme.prune_args import SCOPE_BLOCK, Pruning, Scope
from ...block import Block
from ...solver.damped_hessian import DampedHessian
from ...solver.sweep import sweep
from .layers import prune_linears
from .masks import in_block, in_groups


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SparseGPT:
    """Options of SparseGPT.

    damping          added to the Hessian's diagonal, relative to its mean
    refit            least-squares refit of the weights that are kept
    true_sequential  collect the statistics of each linear after the linears before it in the block are pruned
    drift            share of the error of earlier layers that a layer compensates, 0 (as published) to 1
    """

    scheme: Pruning = Pruning()
    damping: float = 0.01
    refit: bool = False
    true_sequential: bool = False
    drift: float = 0.0
    scope: ClassVar[Scope] = "block"

    def __post_init__(self) -> None:
        if self.scheme.weights.scope not in (None, "block"):
            raise UsageError("SparseGPT supports only the scope block", "leave `scope` out")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics to collect."""
        return frozenset({"hessian", "drift"} if self.drift else {"hessian"})


def apply(config: SparseGPT, block: Block) -> None:
    """Prune every linear of the block."""
    prune_linears(block, config.damping, prune, config.refit, config.drift)


def prune(weight: Tensor, hessian: DampedHessian, args: PruneArgs) -> tuple[Tensor, Tensor]:
    """Sweep over the columns of `weight` `[out, in]`."""
    columns = weight.T.contiguous()
    projection = ZeroProjection(hessian.upper.diagonal(), args, columns)
    sweep(columns, hessian.upper, projection)
    return columns.T, projection.mask.T


class ZeroProjection:
    """Clears the entries of each column that the mask of its span prunes."""

    def __init__(self, diagonal: Tensor, args: PruneArgs, columns: Tensor) -> None:
        self._importance, self._args = diagonal.square().reciprocal().unsqueeze(1), args
        self.span: int | None = args.n_of_m[1] if args.n_of_m else SCOPE_BLOCK
        self.mask = torch.zeros_like(columns, dtype=torch.bool)

    def fit(self, start: int, columns: Tensor) -> None:
        """Choose the mask of the span that begins at `start` from its current values `[span, out]`."""
        stop = start + len(columns)
        scores = (columns.square() * self._importance[start:stop]).T
        pattern = self._args.n_of_m
        chosen = in_groups(scores, pattern) if pattern else in_block(scores, self._args.sparsity)
        self.mask[start:stop] = chosen.T

    def column(self, index: int, column: Tensor) -> Tensor:
        """Clear the pruned entries."""
        return column.masked_fill(self.mask[index], 0)

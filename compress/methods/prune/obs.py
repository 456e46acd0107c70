"""Optimal Brain Surgeon (Hassibi, Stork 1993): delete the weight that costs least and let the others make up for it.

`L_q = w_q^2 / (2 [H^-1]_qq)`, `dw = -(w_q / [H^-1]_qq) H^-1 e_q`. As a pass it works on each layer's own output error, whose
Hessian is cut into diagonal blocks of neighbouring columns (with one block for all it is ExactOBS). `prune_network` is the
surgeon for small networks and, in blocks, for small language models: the Hessian of their own loss is the mean outer
product of gradients, inverted recursively.
"""

from collections.abc import Callable
from dataclasses import dataclass as plain_dataclass
from typing import ClassVar

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
from ...solver.curvature import recursive_inverse
from ...solver.damped_hessian import DampedHessian
from ...solver.masked_lstsq import remove
from ...solver.obs_elimination import eliminate
from .layers import prune_linears
from .masks import smallest


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OBS:
    """Options of OBS.

    block    columns whose weights make up for each other (50 to 100 in the literature of block-diagonal Fishers)
    damping  added to the Hessian's diagonal, relative to its mean; raised tenfold while it cannot be inverted
    """

    scheme: Pruning = Pruning()
    block: int = 64
    damping: float = 0.001
    true_sequential: bool = False
    needs: ClassVar[Needs] = Needs(hessian=True)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError(f"block {self.block} is not a positive number of columns", "use 64")
        if self.scheme.weights.scope == "block":
            raise UsageError("OBS spends one budget on a layer or on each row", "use scope layer or row")


def apply(config: OBS, block: Block) -> None:
    """Prune every linear of the block."""
    prune_linears(block, config.damping, lambda weight, hessian, args: prune(weight, hessian, args, config.block))


def prune(weight: Tensor, hessian: DampedHessian, args: PruneArgs, block: int) -> tuple[Tensor, Tensor]:
    """Eliminate inside blocks of columns of `weight` `[out, in]`, choose among all steps of all blocks together."""
    starts = range(0, weight.shape[1], block)
    order = torch.empty_like(weight)  # the loss of the step that settled each weight, made rising along every block
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
    return torch.cat([remove(part, inverse, mask) for part, inverse, mask in spans], dim=1)


@plain_dataclass(frozen=True)
class Deleted:
    """What `prune_network` did: the weights in order of deletion, and the predicted loss `L_q` of each."""

    order: list[int]
    losses: list[float]


def prune_network(
    weights: Tensor,
    gradients: Callable[[Tensor], Tensor],
    count: int,
    *,
    alpha: float = 1e-4,
    block: int | None = None,
    recompute_every: int | None = None,
    stop: float | None = None,
    error: Callable[[Tensor], float] | None = None,
) -> Deleted:
    """Delete up to `count` of the `weights` float64 `[n]`, in place.

    `gradients(weights)` gives `v` `[P, n]`, one row per pattern and output. The inverse of `alpha I + 1/P sum v v^T` is
    updated after each deletion, and built anew every `recompute_every` of them (a fixed one misleads on networks that are
    far from quadratic). With `error`, pruning stops where the cheapest deletion would cost more than `stop * error(weights)`.
    """
    kept = torch.ones_like(weights, dtype=torch.bool)
    deleted = Deleted([], [])
    inverse = _inverse(gradients(weights), kept, alpha, block)
    size = inverse.shape[-1]
    for step in range(count):
        if recompute_every and step and step % recompute_every == 0:
            inverse = _inverse(gradients(weights), kept, alpha, block)
        diagonal = inverse.diagonal(dim1=1, dim2=2).flatten()[: len(weights)]
        scores = (weights.square() / (2 * diagonal)).masked_fill(~kept, torch.inf)
        chosen = int(scores.argmin())
        if stop is not None and error is not None and float(scores[chosen]) > stop * error(weights):
            break
        part, inside = divmod(chosen, size)
        own = inverse[part]
        span = slice(part * size, min((part + 1) * size, len(weights)))
        column = own[:, inside].clone()
        weights[span] -= (weights[chosen] / column[inside] * column)[: span.stop - span.start]
        own -= torch.outer(column, column) / column[inside]
        own[inside, inside] = 1.0  # the deleted weight no longer takes part
        kept[chosen] = False
        weights[~kept] = 0.0
        deleted.order.append(chosen)
        deleted.losses.append(float(scores[chosen]))
    return deleted


def _inverse(vectors: Tensor, kept: Tensor, alpha: float, block: int | None) -> Tensor:
    """Of the weights that are left: the gradients of deleted ones do not count."""
    return recursive_inverse(vectors.double() * kept, alpha, block)


METHOD = Method(OBS, apply, kinds=frozenset({PRUNED}), scheme=Pruning())

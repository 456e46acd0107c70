"""Optimal Brain Damage (LeCun, Denker, Solla 1990): prune by the saliency `h_kk w_k^2 / 2`, the diagonal of the Hessian.

Two uses. As a pass, the Hessian is that of each layer's own output error, so that `h_kk` is the input's energy and the
ranking inside a row is Wanda's; here all weights of the layer compete. `prune_network` prunes any model by the diagonal of
its own loss (`solver/curvature.py` has the estimators), at once or in steps with the diagonal estimated anew.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....recipes.methods import Method, Needs
from ....recipes.scheme import PruneArgs
from ....recipes.scheme.kind_names import PRUNED
from ....recipes.scheme.prune_args import Pruning, layer_zeros
from ...block import Block
from ...solver.damped_hessian import DampedHessian
from .layers import prune_linears
from .masks import lowest, smallest

Estimate = Callable[[], Sequence[Tensor]]
Retrain = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OBD:
    """Options of OBD.

    refit    least-squares refit of the weights that are left
    damping  of the Hessian that the refit solves against, relative to the mean of its diagonal
    """

    scheme: Pruning = Pruning()
    refit: bool = False
    damping: float = 0.01
    true_sequential: bool = False
    needs: ClassVar[Needs] = Needs(hessian=True)


def apply(config: OBD, block: Block) -> None:
    """Prune every linear of the block."""
    prune_linears(block, config.damping, prune, config.refit)


def prune(weight: Tensor, hessian: DampedHessian, args: PruneArgs) -> tuple[Tensor, Tensor]:
    """Zero the least salient entries of `weight` `[out, in]`."""
    pruned = smallest(saliency(weight, hessian.energy.expand_as(weight)), args)
    return weight.masked_fill(pruned, 0), pruned


def saliency(weight: Tensor, diagonal: Tensor) -> Tensor:
    """`h_kk w_k^2 / 2`; negative second derivatives, which only say that this is no minimum, count as none."""
    return diagonal.clamp(min=0) * weight.square() / 2


@torch.no_grad()
def prune_network(
    parameters: Sequence[Tensor],
    estimate: Estimate,
    sparsity: float,
    steps: int = 1,
    retrain: Retrain | None = None,
) -> list[Tensor]:
    """Prune `parameters` in place, all of them competing; returns the masks of what is pruned.

    In every one of `steps` the density shrinks by the same factor, `estimate()` gives the diagonal anew (in the form of the
    parameters) and, after the weights are deleted, `retrain(masks)` may train what is left.
    """
    masks = [torch.zeros_like(p, dtype=torch.bool) for p in parameters]
    total = sum(p.numel() for p in parameters)
    for step in range(1, steps + 1):
        with torch.enable_grad():
            diagonals = estimate()
        scores = torch.cat([saliency(p, h).flatten() for p, h in zip(parameters, diagonals, strict=True)])
        gone = torch.cat([m.flatten() for m in masks])
        count = layer_zeros(total, 1 - (1 - sparsity) ** (step / steps))
        chosen = lowest(scores.masked_fill(gone, -1.0).unsqueeze(0), count).squeeze(0)
        masks = [
            part.view_as(p) for part, p in zip(chosen.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        _clear(parameters, masks)
        if retrain is not None:
            with torch.enable_grad():
                retrain(masks)
            _clear(parameters, masks)
    return masks


def _clear(parameters: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    for parameter, mask in zip(parameters, masks, strict=True):
        parameter.masked_fill_(mask, 0)


METHOD = Method(OBD, apply, kinds=frozenset({PRUNED}), scheme=Pruning())

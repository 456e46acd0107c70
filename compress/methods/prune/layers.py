"""Common to all pruning methods: the damped Hessian of a block's linears, the refit, the figures."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ....kernels.tensor import PrunedTensor
from ....recipes.scheme import PruneArgs
from ...block import Block, Linear
from ...solver.damped_hessian import DampedHessian, damp
from ...solver.loss import layer_loss
from ...solver.masked_lstsq import masked_lstsq

# (weight float64 `[out, in]` without dead columns, damped Hessian, arguments) -> (new weight, what is pruned)
Prune = Callable[[Tensor, DampedHessian, PruneArgs], tuple[Tensor, Tensor]]


def prune_linears(block: Block, damping: float, prune: Prune, refitted: bool = False, drift: float = 0.0) -> None:
    """Prune every linear of the block by its Hessian; with `refitted`, least squares on the mask follows.

    With `drift` above 0, the weight that is pruned is `W + drift * G Hd^-1`, which compensates that share of the drift `G`
    (`calibrate/statistics/drift.py`). Computed in float64. Records the loss and relative error of the stored weight, and the
    damping that was needed.
    """
    for linear, solved in _with_hessians(block, damping):
        args = linear.prune_args
        weight = linear.weight.double()
        if drift and linear.drift is not None:
            weight = weight + drift * linear.drift.matrix().double() @ solved.inverse
        weight = weight.masked_fill(solved.dead, 0)
        pruned_weight, pruned = prune(weight, solved, args)
        if refitted:
            pruned_weight = masked_lstsq(weight, solved.matrix, pruned, start=pruned_weight)
        linear.result = PrunedTensor.of(pruned_weight, pruned, args)
        linear.figures |= {"damping": solved.damping, "dead_columns": int(solved.dead.sum())}
        record(linear, weight)


def record(linear: Linear, target: Tensor | None = None) -> None:
    """Record the sparsity and, if the Hessian is known, the loss of the stored weight against `target` `[out, in]`."""
    assert isinstance(linear.result, PrunedTensor)
    linear.figures["sparsity"] = 1 - int(linear.result.kept.sum()) / linear.result.kept.numel()
    if linear.hessian is None or target is None:
        return
    hessian = linear.hessian.matrix().double()
    loss = layer_loss(target - linear.result.dequantize(torch.float64), hessian)
    energy = layer_loss(target, hessian)
    linear.figures |= {"loss": loss, "relative_error": (loss / energy) ** 0.5 if energy > 0 else 0.0}


def _with_hessians(block: Block, damping: float) -> Iterator[tuple[Linear, DampedHessian]]:
    """Linears that share an input share one factorisation; only one is in memory at a time."""
    key, solved = None, None
    for linear in block.linears:
        assert linear.hessian is not None
        if solved is None or key != id(linear.hessian):
            key, solved = id(linear.hessian), damp(linear.hessian.matrix(), damping)
        yield linear, solved

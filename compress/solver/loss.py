"""The layer objective, evaluated."""

from torch import Tensor


def layer_loss(delta: Tensor, hessian: Tensor, rows: int = 2048) -> float:
    """`1/2 * tr(D H D^T)` for `delta` `D` `[out, in]` and the undamped `hessian` `[in, in]`; rows in chunks for memory."""
    chunks = delta.split(rows)
    return sum(float((chunk @ hessian).mul_(chunk).sum(dtype=chunk.double().dtype)) for chunk in chunks) / 2

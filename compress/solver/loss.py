"""The layer objective."""

from torch import Tensor

STRIP = 256  # columns per product: the Hessian is symmetric, and only its upper blocks are multiplied


def layer_loss(delta: Tensor, hessian: Tensor, rows: int = 2048) -> float:
    """`1/2 * tr(D H D^T)` for `delta` `D` `[out, in]` and the undamped `hessian` `[in, in]`; rows in chunks for memory."""
    total = 0.0
    for chunk in delta.split(rows):
        for start in range(0, len(hessian), STRIP):
            strip = slice(start, min(start + STRIP, len(hessian)))
            product = chunk[:, strip] @ hessian[strip, strip]
            product.addmm_(chunk[:, strip.stop :], hessian[strip.stop :, strip], alpha=2)
            total += float(product.mul_(chunk[:, strip]).sum(dtype=chunk.double().dtype))
    return total / 2

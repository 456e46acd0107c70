"""The invariant of every calibrated quantizer: its loss on the layer's objective never exceeds that of rounding to nearest."""

from torch import Tensor

from ....kernels.tensor import BlockTensor, Compressed, CompressedTensor, SpQRTensor
from ...block import Linear
from ...solver.loss import layer_loss
from ...solver.target import AsymmetricTarget
from .rtn import round_to_nearest


def keep_better(
    linear: Linear,
    hessian: Tensor,
    target: AsymmetricTarget | None = None,
    rounded: CompressedTensor | BlockTensor | SpQRTensor | None = None,
) -> None:
    """Compare `linear.result` with rounding to nearest by `1/2 tr((W-Q) H (W-Q)^T)`, and keep the better one.

    `hessian` `[in, in]` is undamped. With a `target`, `W` is the target's weight instead of the layer's. `rounded` is the
    rounded weight to compare with; by default `linear.weight` on its own grid, searched with the diagonal of `hessian` as
    weights if its observer is `mse`. Records `loss`, `rtn_loss`, `relative_error` and, if rounding was better, `fallback`.
    """
    assert linear.result is not None
    dtype = hessian.dtype
    weight = linear.weight.to(dtype)
    if rounded is None:
        rounded = round_to_nearest(linear.weight, linear.grid_args, hessian.diagonal().to(linear.weight.dtype))

    def objective(tensor: Compressed) -> float:
        delta = weight - tensor.dequantize(dtype)
        return layer_loss(delta, hessian) + (target.excess(delta) if target else 0.0)

    loss, rtn_loss = objective(linear.result), objective(rounded)
    if not loss <= rtn_loss:
        linear.result, loss = rounded, rtn_loss
        linear.figures["fallback"] = "rtn"
    energy = layer_loss(weight, hessian)
    linear.figures |= {
        "loss": loss,
        "rtn_loss": rtn_loss,
        "relative_error": (max(loss, 0.0) / energy) ** 0.5 if energy > 0 else 0.0,
    }

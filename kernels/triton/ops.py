"""The Triton product as an operator of torch, so that `torch.compile` and `torch.export` see through it.

Weights are given as `arranged.flat` gives their layout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..packed_layout import restored
from .layout import Tiles


@torch.library.custom_op("lmpress::triton_linear", mutates_args=())
def triton_linear(
    x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], activations: str, steps: float
) -> Tensor:
    """`x W^T` for `x` `[m, columns]`, the weight in parts: see `layout.py`."""
    from .launch import multiply

    return multiply(x, restored(Tiles, tensors, numbers), activations, steps)  # type: ignore[arg-type]


@triton_linear.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], *_: object) -> Tensor:
    return x.new_empty(x.shape[0], restored(Tiles, tensors, numbers).rows)


@torch.library.custom_op("lmpress::triton_linear_transposed", mutates_args=())
def triton_linear_transposed(grad: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """`grad W` for `grad` `[m, rows]`: `[m, columns]`, exact; what `triton_linear` sends back to its input."""
    from .launch import multiply_transposed

    return multiply_transposed(grad, restored(Tiles, tensors, numbers))


@triton_linear_transposed.register_fake
def _(grad: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    return grad.new_empty(grad.shape[0], restored(Tiles, tensors, numbers).columns)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, ctx.numbers, *_ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """int8 activations pass gradients straight through, as their rounding has none."""
    tensors = list(ctx.saved_tensors)
    back = torch.ops.lmpress.triton_linear_transposed(grad, tensors, ctx.numbers)
    return back, [None] * len(tensors), None, None, None


triton_linear.register_autograd(_backward, setup_context=_remember)

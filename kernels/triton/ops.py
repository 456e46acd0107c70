"""The Triton product as a torch operator, so that `torch.compile` and `torch.export` can trace it.

Weights are passed as `packed_layout.flatten_layout` returns their layout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..packed_layout import restore_layout
from .layout import Tiles


@torch.library.custom_op("lmpress::triton_linear", mutates_args=())
def triton_linear(
    x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], activations: str, steps: float
) -> Tensor:
    """`x W^T` for `x` `[m, columns]` and a weight in parts (see `layout.py`): `[m, rows]`."""
    from .launch import multiply

    return multiply(x, restore_layout(Tiles, tensors, numbers), activations, steps)  # type: ignore[arg-type]


@triton_linear.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], *_: object) -> Tensor:
    return x.new_empty(x.shape[0], restore_layout(Tiles, tensors, numbers).rows)


@torch.library.custom_op("lmpress::triton_linear_transposed", mutates_args=())
def triton_linear_transposed(grad: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """`grad W` for `grad` `[m, rows]`: `[m, columns]`, exact; the gradient of `triton_linear` with respect to its input."""
    from .launch import multiply_transposed

    return multiply_transposed(grad, restore_layout(Tiles, tensors, numbers))


@triton_linear_transposed.register_fake
def _(grad: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    return grad.new_empty(grad.shape[0], restore_layout(Tiles, tensors, numbers).columns)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, ctx.numbers, *_ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The rounding of int8 activations is ignored (straight-through estimator)."""
    tensors = list(ctx.saved_tensors)
    back = torch.ops.lmpress.triton_linear_transposed(grad, tensors, ctx.numbers)
    return back, [None] * len(tensors), None, None, None


triton_linear.register_autograd(_backward, setup_context=_remember)

"""The Triton product as an operator of torch, so that `torch.compile` and `torch.export` see through it."""

from typing import Any

import torch
from torch import Tensor

from .layout import Tiles


@torch.library.custom_op("lmpress::triton_linear", mutates_args=())
def triton_linear(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    rows: int,
    columns: int,
    group: int,
    bits: int,
    width: int,
    real: bool,
    activations: str,
    steps: float,
) -> Tensor:
    """`x W^T` for `x` `[m, columns]`, the weight in parts: see `layout.py`."""
    from .launch import multiply

    tiles = Tiles(low, high, scales, zeros, table, rows, columns, group, bits, width, real)
    return multiply(x, tiles, activations, steps)  # type: ignore[arg-type]


@triton_linear.register_fake
def _(
    x: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    rows: int,
    *_: object,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("lmpress::triton_linear_transposed", mutates_args=())
def triton_linear_transposed(
    grad: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    rows: int,
    columns: int,
    group: int,
    bits: int,
    width: int,
    real: bool,
) -> Tensor:
    """`grad W` for `grad` `[m, rows]`: `[m, columns]`, exact; what `triton_linear` sends back to its input."""
    from .launch import multiply_transposed

    return multiply_transposed(grad, Tiles(low, high, scales, zeros, table, rows, columns, group, bits, width, real))


@triton_linear_transposed.register_fake
def _(
    grad: Tensor,
    low: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    rows: int,
    columns: int,
    *_: object,
) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors = inputs[:6]
    ctx.save_for_backward(*tensors)
    ctx.shape = inputs[6:12]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """int8 activations pass gradients straight through, as their rounding has none."""
    return torch.ops.lmpress.triton_linear_transposed(grad, *ctx.saved_tensors, *ctx.shape), *(None,) * 13


triton_linear.register_autograd(_backward, setup_context=_remember)

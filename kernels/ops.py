"""The CPU kernels as torch operators, with shapes for tracing, so that `torch.compile` and `torch.export` can trace them.

Eager calls bypass the operators, whose overhead is larger than a small product. Weights in panels are passed as
`packed_layout.flatten_layout` returns them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cpu import library, product, pruned
from .cpu.layout import Panels
from .packed_layout import restore_layout
from .weight import SparseRows


@torch.library.custom_op("lmpress::cpu_linear", mutates_args=(), device_types="cpu")
def cpu_linear(
    x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], instructions: str, activations: str, steps: float
) -> Tensor:
    """`x W^T` for `x` `[m, columns]` and a weight in panels: `[m, rows]`. See `cpu/product.py`."""
    return product.multiply(
        x, library.Linear(restore_layout(Panels, tensors, numbers), instructions, activations, steps)
    )


@cpu_linear.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], *_: object) -> Tensor:
    return x.new_empty(x.shape[0], restore_layout(Panels, tensors, numbers).rows)


@torch.library.custom_op("lmpress::cpu_linear_transposed", mutates_args=(), device_types="cpu")
def cpu_linear_transposed(grad: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], instructions: str) -> Tensor:
    """`grad W` for `grad` `[m, rows]`: `[m, columns]`, exact; the gradient of `cpu_linear` with respect to its input."""
    panels, inputs = restore_layout(Panels, tensors, numbers), grad.to(torch.float32).contiguous()
    return product.multiply_transposed(inputs, panels, library.instruction_set(instructions)).to(grad.dtype)


@cpu_linear_transposed.register_fake
def _(grad: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], *_: object) -> Tensor:
    return grad.new_empty(grad.shape[0], restore_layout(Panels, tensors, numbers).columns)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, ctx.numbers, ctx.instructions, *_ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The rounding of int8 activations is ignored (straight-through estimator)."""
    tensors = list(ctx.saved_tensors)
    back = torch.ops.lmpress.cpu_linear_transposed(grad, tensors, ctx.numbers, ctx.instructions)
    return back, [None] * len(tensors), None, None, None, None


cpu_linear.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("lmpress::cpu_add_sparse", mutates_args=(), device_types="cpu")
def cpu_add_sparse(y: Tensor, x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`y + x S^T` for S in compressed rows; `y` `[m, rows]` and `x` `[m, width]` in float32."""
    total = y.clone(memory_format=torch.contiguous_format)
    library.add_sparse(total, x.contiguous(), starts, columns, values)
    return total


@cpu_add_sparse.register_fake
def _(y: Tensor, x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(y)


def _remember_sparse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, *sparse = inputs
    ctx.width = x.shape[1]
    ctx.save_for_backward(*sparse)


def _backward_sparse(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    starts, columns, values = ctx.saved_tensors
    entries = grad[:, SparseRows(starts, columns, values).rows] * values
    return grad, grad.new_zeros(grad.shape[0], ctx.width).index_add(1, columns.long(), entries), None, None, None


cpu_add_sparse.register_autograd(_backward_sparse, setup_context=_remember_sparse)


@torch.library.custom_op("lmpress::cpu_pruned_linear", mutates_args=(), device_types="cpu")
def cpu_pruned_linear(x: Tensor, mask: Tensor, values: Tensor, starts: Tensor, instructions: str) -> Tensor:
    """`x W^T` for `x` `[m, columns]` and a pruned weight: `[m, rows]`. See `cpu/pruned.py`."""
    return pruned.multiply(x, mask, values, starts, instructions)


@cpu_pruned_linear.register_fake
def _(x: Tensor, mask: Tensor, values: Tensor, starts: Tensor, instructions: str) -> Tensor:
    return x.new_empty(x.shape[0], mask.shape[0])


@torch.library.custom_op("lmpress::cpu_pruned_linear_transposed", mutates_args=(), device_types="cpu")
def cpu_pruned_linear_transposed(
    grad: Tensor, mask: Tensor, values: Tensor, starts: Tensor, columns: int, instructions: str
) -> Tensor:
    """`grad W` for `grad` `[m, rows]`: `[m, columns]`; the gradient of `cpu_pruned_linear` with respect to its input."""
    return pruned.multiply_transposed(grad, mask, values, starts, columns, instructions)


@cpu_pruned_linear_transposed.register_fake
def _(grad: Tensor, mask: Tensor, values: Tensor, starts: Tensor, columns: int, instructions: str) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


def _remember_pruned(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, ctx.instructions = inputs
    ctx.columns = x.shape[1]
    ctx.save_for_backward(*weight)


def _backward_pruned(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.lmpress.cpu_pruned_linear_transposed(grad, *ctx.saved_tensors, ctx.columns, ctx.instructions)
    return back, None, None, None, None


cpu_pruned_linear.register_autograd(_backward_pruned, setup_context=_remember_pruned)

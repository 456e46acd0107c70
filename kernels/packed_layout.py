"""Weights in a kernel's layout: as the buffers of a module, and as arguments of torch operators.

A layout is a dataclass whose fields are tensors, optional tensors and integers.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

from torch import Tensor

from .kernel import CodedProduct

Layout = TypeVar("Layout")


class PackedLayout(CodedProduct, Generic[Layout]):
    """The product of a weight in a layout, whose tensors are buffers with the names of the fields."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._type = type(layout)
        self._numbers: dict[str, int] = {}
        for each in fields(layout):  # type: ignore[arg-type]
            value = getattr(layout, each.name)
            if _is_tensor(each.type):
                self.register_buffer(each.name, value, persistent=False)
            else:
                self._numbers[each.name] = value

    @property
    def layout(self) -> Layout:
        """The weight as the kernels read it."""
        return self._type(**self._buffers, **self._numbers)


def flatten_layout(layout: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors of `layout` that are present, and a number per field: its value, or 1 if its tensor is present, else 0."""
    values = [getattr(layout, each.name) for each in fields(layout)]
    tensors = [value for value in values if isinstance(value, Tensor)]
    tensor_fields = [_is_tensor(each.type) for each in fields(layout)]
    return tensors, [
        int(value is not None if is_tensor else value) for value, is_tensor in zip(values, tensor_fields, strict=True)
    ]


def restore_layout(layout: type[Layout], tensors: Sequence[Tensor], numbers: Sequence[int]) -> Layout:
    """The inverse of `flatten_layout` for a layout of the type `layout`."""
    remaining = iter(tensors)
    values = [
        (next(remaining) if number else None) if _is_tensor(each.type) else number
        for each, number in zip(fields(layout), numbers, strict=True)  # type: ignore[arg-type]
    ]
    return layout(*values)


def _is_tensor(annotation: object) -> bool:
    return annotation in (Tensor, Tensor | None)

"""Weights in a kernel's layout: as the buffers of a module, and as what operators of torch take.

A layout is a dataclass whose fields are tensors, tensors that may be missing, and whole numbers.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

from torch import Tensor

from .kernel import CodedProduct

Layout = TypeVar("Layout")


class PackedLayout(CodedProduct, Generic[Layout]):
    """The product of a weight whose layout's tensors are buffers of their own names."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._kind = type(layout)
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
        return self._kind(**self._buffers, **self._numbers)


def flat(layout: Any) -> tuple[list[Tensor], list[int]]:
    """The tensors of `layout` that are there, and a number for each field: its own, or whether the tensor is there."""
    values = [getattr(layout, each.name) for each in fields(layout)]
    tensors = [value for value in values if isinstance(value, Tensor)]
    kinds = [_is_tensor(each.type) for each in fields(layout)]
    return tensors, [int(value is not None if kind else value) for value, kind in zip(values, kinds, strict=True)]


def restored(kind: type[Layout], tensors: Sequence[Tensor], numbers: Sequence[int]) -> Layout:
    """The inverse of `flat` for a layout of this kind."""
    left = iter(tensors)
    values = [
        (next(left) if number else None) if _is_tensor(each.type) else number
        for each, number in zip(fields(kind), numbers, strict=True)  # type: ignore[arg-type]
    ]
    return kind(*values)


def _is_tensor(annotation: object) -> bool:
    return annotation in (Tensor, Tensor | None)

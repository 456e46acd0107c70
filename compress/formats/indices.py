"""Checks of the indices that a checkpoint states: kernels read and write at them, so none may lie outside its tensor."""

from torch import Tensor

from ...errors import CompressError

DAMAGED = "the checkpoint is damaged: download or write it again"


def check_range(name: str, indices: Tensor, end: int) -> None:
    """Raise `CompressError` unless all integers of the tensor `name` are in 0 .. `end` - 1."""
    if indices.numel() == 0:
        return
    low, high = (int(each) for each in indices.long().aminmax())
    if low < 0 or high >= end:
        found = low if low < 0 else high
        raise CompressError(f"{name} holds {found}, expected numbers from 0 to {end - 1}", DAMAGED)


def check_ascending(name: str, indices: Tensor, end: int) -> None:
    """Raise `CompressError` unless the integers of the tensor `name` are in 0 .. `end` - 1, each larger than the one before."""
    check_range(name, indices, end)
    if bool((indices.long().diff() <= 0).any()):
        raise CompressError(f"{name} holds numbers that do not ascend", DAMAGED)


def check_shape(name: str, stated: Tensor, shape: tuple[int, int]) -> None:
    """Raise `CompressError` unless the tensor `name` states (out, in) as the other tensors of the layer have it."""
    found = tuple(stated.tolist())
    if found != shape:
        raise CompressError(f"{name} is {found}, and the layer's other tensors make {shape}", DAMAGED)

"""The tensors that a compressed weight is made of."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Instance = TypeVar("Instance", bound="DataclassInstance")


def parts(tensor: "DataclassInstance") -> dict[str, Tensor | None]:
    """The tensors of `tensor` by the names of their fields, `None` if one is absent."""
    return {each.name: getattr(tensor, each.name) for each in fields(tensor) if each.type in (Tensor, Tensor | None)}


def settings(tensor: "DataclassInstance") -> dict[str, Any]:
    """The fields of `tensor` that are not tensors: its arguments."""
    return {each.name: getattr(tensor, each.name) for each in fields(tensor) if each.name not in parts(tensor)}


def moved(tensor: Instance, device: torch.device | str) -> Instance:
    """The same on `device`."""
    return replace(tensor, **{name: part.to(device) for name, part in parts(tensor).items() if part is not None})

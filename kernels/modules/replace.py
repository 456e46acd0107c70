"""Packed layers in place of a model's linear layers and tables."""

import torch
from torch import nn

from ...errors import CompressError
from ...recipes.scheme import kinds
from ..tensor import Compressed
from .linear import Serving


def replace_linear(
    model: nn.Module, name: str, tensor: Compressed, serving: Serving | None = None, device: torch.device | str = "cpu"
) -> None:
    """Put a module that serves `tensor` on `device` at the dotted `name`, of a linear layer, whose bias is kept, or a table.

    Raises `CompressError` if `name` is a table and tables of this kind of weight are not served.
    """
    parent, _, leaf = name.rpartition(".")
    old, served = model.get_submodule(name), tensor.to(device)
    if isinstance(old, nn.Embedding):
        new = _table(name, served, serving or Serving())
    else:
        new = packed_linear(served, getattr(old, "bias", None), serving)
    setattr(model.get_submodule(parent), leaf, new)


def packed_linear(tensor: Compressed, bias: nn.Parameter | None, serving: Serving | None) -> nn.Module:
    """The module that replaces a linear layer, with the weight `tensor`."""
    return kinds.kind_of_tensor(tensor).module(tensor, bias, serving)


def _table(name: str, tensor: Compressed, serving: Serving) -> nn.Module:
    kind = kinds.kind_of_tensor(tensor)
    if kind.table is None:
        label = kinds.kind_of(tensor.args).label(tensor.args)
        raise CompressError(f"{name} is a table of {label} weights, which is not served", "keep it dense")
    return kind.table(tensor, serving.dtype)

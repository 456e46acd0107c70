"""Packed layers in place of a model's linear layers."""

import torch
from torch import nn

from ..compress.tensor import Compressed, CompressedTensor, SpQRTensor
from .linear import PackedLinear, Serving, SpQRLinear
from .quantized_inputs import IntegerLinear
from .stored import StoredLinear


def replace_linear(
    model: nn.Module, name: str, tensor: Compressed, serving: Serving | None = None, device: torch.device | str = "cpu"
) -> None:
    """Put a module that serves `tensor` on `device` at the dotted `name`, keeping the bias parameter that stands there."""
    parent, _, leaf = name.rpartition(".")
    bias = getattr(model.get_submodule(name), "bias", None)
    if isinstance(tensor, SpQRTensor):
        module = SpQRLinear(tensor.to(device), bias, serving)
    elif not isinstance(tensor, CompressedTensor):
        module = StoredLinear(tensor, bias)
    elif tensor.inputs is not None:
        module = IntegerLinear(tensor.to(device), bias, serving)
    else:
        module = PackedLinear(tensor.to(device), bias, serving)
    setattr(model.get_submodule(parent), leaf, module)

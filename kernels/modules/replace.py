"""Packed layers in place of a model's linear layers and tables."""

import torch
from torch import nn

from ..tensor import Compressed, CompressedTensor, LowRankTensor, NF4Tensor, PrunedTensor, SpQRTensor
from .embedding import PackedEmbedding
from .linear import PackedLinear, PrunedLinear, Serving, SpQRLinear
from .low_rank import LowRankLinear
from .quantized_inputs import IntegerLinear
from .stored import StoredLinear


def replace_linear(
    model: nn.Module, name: str, tensor: Compressed, serving: Serving | None = None, device: torch.device | str = "cpu"
) -> None:
    """Put a module that serves `tensor` on `device` at the dotted `name`, of a linear layer, whose bias is kept, or a table."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    if isinstance(old, nn.Embedding):
        assert isinstance(tensor, CompressedTensor)
        new: nn.Module = PackedEmbedding(tensor.to(device), (serving or Serving()).dtype)
    else:
        new = _module(tensor, getattr(old, "bias", None), serving, device)
    setattr(model.get_submodule(parent), leaf, new)


def _module(
    tensor: Compressed, bias: nn.Parameter | None, serving: Serving | None, device: torch.device | str
) -> nn.Module:
    if isinstance(tensor, LowRankTensor):
        return LowRankLinear(_module(tensor.base, bias, serving, device), tensor).to(device)
    if isinstance(tensor, NF4Tensor) and not tensor.rows_are_blocks:
        return StoredLinear(tensor, bias)
    if isinstance(tensor, PrunedTensor):
        return PrunedLinear(tensor.to(device), bias, serving)
    if isinstance(tensor, SpQRTensor):
        return SpQRLinear(tensor.to(device), bias, serving)
    if isinstance(tensor, CompressedTensor) and tensor.inputs is not None:
        return IntegerLinear(tensor.to(device), bias, serving)
    return PackedLinear(tensor.to(device), bias, serving)

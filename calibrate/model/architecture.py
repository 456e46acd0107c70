"""Decoder blocks and linear layers of a model, found by its structure: no table of architectures."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import UsageError
from .moe import routers


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The dotted name and the list of the decoder blocks: the module list with the most parameters.

    Raises `UsageError` if the model has no list of modules.
    """
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise UsageError(
            f"{type(model).__name__} has no list of decoder blocks", "only models made of decoder blocks are supported"
        )
    return max(lists, key=lambda item: (sum(p.numel() for p in item[1].parameters()), -len(item[0])))


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by their dotted names inside it, in order of definition: `nn.Linear` and `Conv1D`.

    Routers of a mixture of experts are left out.
    """
    excluded = routers(block)
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: module for name, module in linears.items() if module not in excluded}


def weight_of(linear: nn.Module) -> Tensor:
    """A view of the weight as `[out, in]`, whatever the module's own layout (`Conv1D` stores `[in, out]`)."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def set_weight(linear: nn.Module, weight: Tensor) -> None:
    """Overwrite the weight with `weight` `[out, in]`, in the module's own layout and dtype."""
    with torch.no_grad():
        weight_of(linear).copy_(weight)

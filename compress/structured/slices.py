"""Slices of a block for width pruning: a linear layer that loses input channels, and the layers that produce these channels.

Slices follow from the structure: linears of one module that read the same tensor produce channels, and the linear after them
reads these. `width.py` verifies the result numerically.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...calibrate.model.architecture import find_linears, weight_of
from ...errors import UsageError


@dataclass(frozen=True)
class ChannelSlice:
    """`consumer` reads `groups` groups of channels that can be removed; `producers` maps the layers that produce them to rows.

    The value is rows per group; a producer may have several runs of rows, each with all groups in order (a fused gate and up
    projection has two).
    """

    consumer: str
    groups: int
    producers: Mapping[str, tuple[int, ...]]

    def size(self, block: nn.Module) -> int:
        """Columns of the consumer per group."""
        return weight_of(block.get_submodule(self.consumer)).shape[1] // self.groups

    def rows(self, producer: str, removed: Tensor) -> Tensor:
        """The rows of `producer` that stay if the groups `removed` (bool `[groups]`) are removed: bool `[rows]`."""
        return torch.cat([(~removed).repeat_interleave(size) for size in self.producers[producer]])


def mlp_slice(block: nn.Module, shared_inputs: Sequence[Sequence[str]], width: int) -> ChannelSlice:
    """The `width` inner channels of the block's MLP; `shared_inputs` are the linears by common input, in order of use.

    Raises `UsageError` if the block has no plain MLP, such as in a mixture of experts.
    """
    linears = find_linears(block)
    for producers in shared_inputs:
        parent = producers[0].rpartition(".")[0]
        readers = [
            name
            for group in shared_inputs
            for name in group
            if name.rpartition(".")[0] == parent and name not in producers
        ]
        rows = [weight_of(linears[name]).shape[0] for name in producers]
        reads = [weight_of(linears[name]).shape[1] for name in readers]
        if reads == [width] and all(count % width == 0 for count in rows):
            return ChannelSlice(
                readers[0], width, {n: (1,) * (c // width) for n, c in zip(producers, rows, strict=True)}
            )
    raise UsageError(f"{type(block).__name__} has no plain MLP whose width could be pruned", "leave out --mlp-width")


def attention_slice(block: nn.Module, shared_inputs: Sequence[Sequence[str]], config: Any) -> ChannelSlice:
    """The key-value heads of the block with the query heads that read them.

    Raises `UsageError` if queries, keys and values are not separate linears.
    """
    linears = find_linears(block)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    for producers in shared_inputs:
        parent = producers[0].rpartition(".")[0]
        readers = [
            name
            for group in shared_inputs
            for name in group
            if name.rpartition(".")[0] == parent and name not in producers
        ]
        if not hasattr(block.get_submodule(parent), "head_dim") or len(producers) != 3 or len(readers) != 1:
            continue
        if weight_of(linears[readers[0]]).shape[1] % groups == 0:
            rows = {name: weight_of(linears[name]).shape[0] for name in producers}
            if all(count % groups == 0 for count in rows.values()):
                return ChannelSlice(readers[0], groups, {name: (count // groups,) for name, count in rows.items()})
    raise UsageError(f"{type(block).__name__} has no separate queries, keys and values", "leave out --kv-heads")


def sliced_tensors(block: nn.Module, part: ChannelSlice, removed: Tensor) -> dict[str, Tensor]:
    """The tensors of consumer and producers without the groups `removed`, by their names inside the block."""
    tensors = {}
    for name in part.producers:
        kept = part.rows(name, removed)
        for leaf, parameter in block.get_submodule(name).named_parameters(recurse=False):
            across = parameter.ndim > 1 and isinstance(block.get_submodule(name), Conv1D)
            tensors[f"{name}.{leaf}"] = parameter.detach()[:, kept] if across else parameter.detach()[kept]
    kept = (~removed).repeat_interleave(part.size(block))
    consumer = block.get_submodule(part.consumer)
    weight = consumer.get_parameter("weight").detach()
    tensors[f"{part.consumer}.weight"] = weight[kept] if isinstance(consumer, Conv1D) else weight[:, kept]
    return tensors

"""Where a block can become narrower: a linear layer that loses input channels, and the layers that make these channels.

Found by structure: linears of one module that read the same tensor make channels, the one behind them reads these. Whether
the cut is right is proven afterwards, numerically (see width.py).
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
class Cut:
    """`consumer` reads `groups` groups of channels that can go; `makers` maps the layers that make them to their rows a group.

    A maker may hold several runs of rows, each with all groups in order (a fused gate and up has two).
    """

    consumer: str
    groups: int
    makers: Mapping[str, tuple[int, ...]]

    def size(self, block: nn.Module) -> int:
        """Columns of the consumer in a group."""
        return weight_of(block.get_submodule(self.consumer)).shape[1] // self.groups

    def rows(self, maker: str, gone: Tensor) -> Tensor:
        """Which rows of `maker` stay when the groups `gone` (bool `[groups]`) go: bool `[rows]`."""
        return torch.cat([(~gone).repeat_interleave(size) for size in self.makers[maker]])


def mlp_cut(block: nn.Module, sharing: Sequence[Sequence[str]], width: int) -> Cut:
    """The `width` inner channels of the block's MLP; `sharing` are the linears by common input, in order of use.

    Raises `UsageError` where there is no plain one, such as in a mixture of experts.
    """
    linears = find_linears(block)
    for makers in sharing:
        parent = makers[0].rpartition(".")[0]
        readers = [
            name for group in sharing for name in group if name.rpartition(".")[0] == parent and name not in makers
        ]
        rows = [weight_of(linears[name]).shape[0] for name in makers]
        reads = [weight_of(linears[name]).shape[1] for name in readers]
        if reads == [width] and all(count % width == 0 for count in rows):
            return Cut(readers[0], width, {n: (1,) * (c // width) for n, c in zip(makers, rows, strict=True)})
    raise UsageError(f"{type(block).__name__} has no plain MLP to narrow", "leave out --mlp-width")


def attention_cut(block: nn.Module, sharing: Sequence[Sequence[str]], config: Any) -> Cut:
    """The key-value heads of the block with the query heads that read them.

    Raises `UsageError` where queries, keys and values are no linears of their own.
    """
    linears = find_linears(block)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    for makers in sharing:
        parent = makers[0].rpartition(".")[0]
        readers = [
            name for group in sharing for name in group if name.rpartition(".")[0] == parent and name not in makers
        ]
        if not hasattr(block.get_submodule(parent), "head_dim") or len(makers) != 3 or len(readers) != 1:
            continue
        if weight_of(linears[readers[0]]).shape[1] % groups == 0:
            rows = {name: weight_of(linears[name]).shape[0] for name in makers}
            if all(count % groups == 0 for count in rows.values()):
                return Cut(readers[0], groups, {name: (count // groups,) for name, count in rows.items()})
    raise UsageError(f"{type(block).__name__} has no separate queries, keys and values", "leave out --kv-heads")


def cut_tensors(block: nn.Module, cut: Cut, gone: Tensor) -> dict[str, Tensor]:
    """The smaller tensors of consumer and makers by their names inside the block, when the groups `gone` go."""
    tensors = {}
    for name in cut.makers:
        kept = cut.rows(name, gone)
        for leaf, parameter in block.get_submodule(name).named_parameters(recurse=False):
            across = parameter.ndim > 1 and isinstance(block.get_submodule(name), Conv1D)
            tensors[f"{name}.{leaf}"] = parameter.detach()[:, kept] if across else parameter.detach()[kept]
    kept = (~gone).repeat_interleave(cut.size(block))
    consumer = block.get_submodule(cut.consumer)
    weight = consumer.get_parameter("weight").detach()
    tensors[f"{cut.consumer}.weight"] = weight[kept] if isinstance(consumer, Conv1D) else weight[:, kept]
    return tensors

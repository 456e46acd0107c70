"""A module of a block on its own: what it was called with on calibration rows, and how far its output has moved since."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...calibrate.runner import Call
from ...calibrate.wiring.feeds import Feed
from ..passes import Block

Batch = tuple[Call, Tensor, Tensor | None]  # how the block is called, hidden states [rows, length, width], token mask


@dataclass(frozen=True)
class Recording:
    """`calls` of `module` with their masks of real tokens, `inputs` of one of its linears `[tokens, width]` (real tokens),
    and the `outputs` at the time of the recording."""

    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]]
    inputs: Tensor
    outputs: list[Tensor]

    def loss(self) -> float:
        """Mean squared difference of the module's output now from the recorded one, over real tokens."""
        total, count = 0.0, 0
        for (args, kwargs, mask), recorded in zip(self.calls, self.outputs, strict=True):
            difference = tokens(_tensor(self.module(*args, **kwargs)) - recorded, mask)
            total += float(difference.square().sum(dtype=torch.float64))
            count += difference.numel()
        return total / max(count, 1)


@torch.no_grad()
def record(block: Block, name: str, reader: str, limit: int) -> Recording:
    """Run the block on calibration batches until `limit` tokens were seen: note the calls of the module `name` (the block
    itself where it is empty) and the inputs of its linear `reader`."""
    assert block.around is not None
    module, linear = block.module.get_submodule(name), block.module.get_submodule(reader)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    seen = 0
    for call, hidden, mask in block.around.samples():

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, mask: Tensor | None = mask) -> None:
            calls.append((args, kwargs, mask))
            outputs.append(_tensor(output).clone())

        def read(module: nn.Module, args: tuple[Tensor, ...], mask: Tensor | None = mask) -> None:
            inputs.append(tokens(args[0], mask))

        handles = [module.register_forward_hook(note, with_kwargs=True), linear.register_forward_pre_hook(read)]
        call.replay(block.module, hidden)
        for handle in handles:
            handle.remove()
        seen += hidden.shape[0] * hidden.shape[1]
        if seen >= limit:
            break
    return Recording(module, calls, torch.cat(inputs), outputs)


def inspected(block: nn.Module, feed: Feed, with_source: bool = False) -> str:
    """The module whose output judges a choice for `feed`: the smallest one that holds all consumers.

    A single linear behind another linear is judged by itself; behind a norm by its parent (attention for a fused
    projection), unless that is the whole block.
    `with_source` asks for a module that holds the source as well.
    """
    names = [consumer.module for consumer in feed.consumers] + [feed.source] * with_source
    paths = [name.split(".") for name in names]
    if len({tuple(path) for path in paths}) == 1:
        name = feed.consumers[0].module
        parent = name.rpartition(".")[0]
        return parent if feed.kind != "linear" and parent and isinstance(block.get_submodule(name), LINEAR) else name
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


LINEAR = (nn.Linear, Conv1D)


def inputs_seen(
    block: nn.Module, batches: Iterable[Batch], names: Sequence[str], limit: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """For every batch, what the linears `names` of `block` read `[tokens, width]`, real tokens only; until `limit` tokens."""
    seen = 0
    for call, hidden, mask in batches:
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in names:
                hooks.callback(block.get_submodule(name).register_forward_pre_hook(_noting(found, name, mask)).remove)
            call.replay(block, hidden)
        yield found
        seen += hidden.shape[0] * hidden.shape[1]
        if limit is not None and seen >= limit:
            return


def tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` `[..., width]` as `[real tokens, width]`; what does not have the mask's shape (routed tokens) counts in full."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or mask.numel() != flat.shape[0]:
        return flat
    return flat[mask.reshape(-1).bool()]


def _noting(
    found: dict[str, Tensor], name: str, mask: Tensor | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = tokens(args[0], mask)

    return note


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

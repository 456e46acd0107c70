"""A module of a block on its own: what it was called with on calibration rows, and how far its output has moved since."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....calibrate.channel_graph.links import ChannelLink
from ....calibrate.recording import LINEAR, tokens
from ...block import Block


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
    assert block.context is not None
    module, linear = block.module.get_submodule(name), block.module.get_submodule(reader)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    seen = 0
    for call, hidden, mask in block.context.samples():

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


def module_to_inspect(block: nn.Module, link: ChannelLink, with_producer: bool = False) -> str:
    """The module whose output judges a choice for `link`: the smallest one that holds all consumers.

    A single linear behind another linear is judged by itself; behind a norm by its parent (attention for a fused
    projection), unless that is the whole block.
    `with_producer` asks for a module that holds the source as well.
    """
    names = [consumer.module for consumer in link.consumers] + [link.producer] * with_producer
    paths = [name.split(".") for name in names]
    if len({tuple(path) for path in paths}) == 1:
        name = link.consumers[0].module
        parent = name.rpartition(".")[0]
        return parent if link.kind != "linear" and parent and isinstance(block.get_submodule(name), LINEAR) else name
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

"""Recording the calls of one module of a block on calibration rows, to measure how its output changes afterwards."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....calibrate.channel_graph.links import ChannelLink
from ....calibrate.recording import LINEAR, tokens
from ...block import Block


@dataclass(frozen=True)
class Recording:
    """Recorded calls of a module.

    calls    positional and keyword arguments, and the mask of real tokens or None
    inputs   of one of the module's linears, `[real tokens, width]`
    outputs  of the module at the time of the recording, by call
    """

    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]]
    inputs: Tensor
    outputs: list[Tensor]

    def loss(self) -> float:
        """Mean squared difference between the module's present and recorded outputs, over real tokens."""
        total, count = 0.0, 0
        for (args, kwargs, mask), recorded in zip(self.calls, self.outputs, strict=True):
            difference = tokens(_tensor(self.module(*args, **kwargs)) - recorded, mask)
            total += float(difference.square().sum(dtype=torch.float64))
            count += difference.numel()
        return total / max(count, 1)


@torch.no_grad()
def record(block: Block, name: str, linear_name: str, limit: int) -> Recording:
    """Record the calls of the module `name` of the block (the block itself if empty) and the inputs of a linear in it.

    The block is run on calibration batches until there were `limit` tokens.
    """
    assert block.context is not None
    module, linear = block.module.get_submodule(name), block.module.get_submodule(linear_name)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    count = 0
    for call, hidden, mask in block.context.samples():

        def add_call(
            module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, mask: Tensor | None = mask
        ) -> None:
            calls.append((args, kwargs, mask))
            outputs.append(_tensor(output).clone())

        def add_input(module: nn.Module, args: tuple[Tensor, ...], mask: Tensor | None = mask) -> None:
            inputs.append(tokens(args[0], mask))

        handles = [
            module.register_forward_hook(add_call, with_kwargs=True),
            linear.register_forward_pre_hook(add_input),
        ]
        call.replay(block.module, hidden)
        for handle in handles:
            handle.remove()
        count += hidden.shape[0] * hidden.shape[1]
        if count >= limit:
            break
    return Recording(module, calls, torch.cat(inputs), outputs)


def module_to_inspect(block: nn.Module, link: ChannelLink, with_producer: bool = False) -> str:
    """The name of the module whose output change is the loss of a search for `link`: the smallest one with all consumers.

    For a single consumer after a linear it is the consumer itself; after a norm it is the consumer's parent (attention for a
    fused projection), unless that is the whole block. `with_producer` requires the module to contain the producer as well.
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

"""Moving a factor per channel from a source into its consumers: what AWQ and SmoothQuant have in common.

    source / s (weight and bias),   consumers * s        the function stays, the consumers' inputs are divided by s

Every fold is checked on the block itself before it is kept (identity I6), and undone to the last bit where it fails.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....calibrate.channel_graph.links import ChannelLink, Consumer
from ....calibrate.model.architecture import weight_of
from ....calibrate.runner import Call

TOLERANCE = 1e-4  # I6: of the largest output value, in float32


@dataclass(frozen=True)
class Rescale:
    """The factor `scale` `[link.size]`, positive, one for each output channel of the source; 1 where nothing is moved."""

    link: ChannelLink
    scale: Tensor

    @property
    def columns(self) -> Tensor:
        """The factor of each input channel of the consumers `[width]`."""
        return expand_channels(self.scale, self.link.channels)


@torch.no_grad()
def fold(block: nn.Module, rescale: Rescale, stored: torch.dtype = torch.float32) -> Tensor:
    """Rewrite the weights of source and consumers in place. Returns the factors `[width]` that the consumers got.

    A norm's weight will be stored in the dtype `stored`: it is rounded to it here, and the consumers get what it has really
    lost, so that a coarse dtype costs nothing.
    """
    link, scale = rescale.link, rescale.scale.double()
    source = block.get_submodule(link.producer)
    weight = source.weight
    assert isinstance(weight, Tensor)
    if link.kind == "linear":
        weight_of(source).div_(scale.to(weight).unsqueeze(1))
    else:
        offset = 1.0 if link.kind == "offset-norm" else 0.0
        gain = weight.double() + offset
        reduced = (gain / scale - offset).to(stored).to(weight.dtype)
        effective = gain / (reduced.double() + offset)
        scale = torch.where(effective.isfinite() & (effective > 0), effective, scale)
        weight.copy_(reduced)
    if isinstance(bias := getattr(source, "bias", None), Tensor):
        bias.copy_(bias.double() / scale)
    columns = expand_channels(scale, link.channels)
    for consumer in link.consumers:
        parameter = parameter_of(block, consumer)
        parameter.mul_(broadcast_along(columns, consumer.axis, parameter.ndim).to(parameter))
    return columns


def fold_or_revert(
    block: nn.Module, rescale: Rescale, call: Call, hidden: Tensor, stored: torch.dtype = torch.float32
) -> float:
    """`fold`, kept only if the block's output on `hidden` changes by no more than `TOLERANCE`.

    Returns the largest change relative to the largest output value; above `TOLERANCE` the weights are as they were.
    """
    return apply_or_revert(
        lambda: fold(block, rescale, stored), folded_parameters(block, rescale.link), block, call, hidden
    )


@torch.no_grad()
def apply_or_revert(
    change: Callable[[], object],
    parameters: list[Tensor],
    block: nn.Module,
    call: Call,
    hidden: Tensor,
) -> float:
    """Carry out `change`, which rewrites `parameters` of the block; undo it where the block's output moves. See above."""
    before = [parameter.clone() for parameter in parameters]
    reference = call.replay(block, hidden)
    change()
    difference = relative_difference(call.replay(block, hidden), reference)
    if not difference <= TOLERANCE:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return difference


def relative_difference(output: Tensor, reference: Tensor) -> float:
    """The largest absolute difference over the largest value of `reference`; NaN where anything is not finite."""
    return float((output - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def folded_parameters(block: nn.Module, link: ChannelLink) -> list[Tensor]:
    """The parameters that folding rewrites."""
    own = block.get_submodule(link.producer).parameters(recurse=False)
    return [*own, *(parameter_of(block, consumer) for consumer in link.consumers)]


def parameter_of(block: nn.Module, consumer: Consumer) -> Tensor:
    """The consumer's parameter itself, in its own layout."""
    return block.get_submodule(consumer.module).get_parameter(consumer.parameter)


def consumer_weights(block: nn.Module, link: ChannelLink) -> Iterator[Tensor]:
    """The consumers' parameters as matrices `[outputs, width]`."""
    for consumer in link.consumers:
        yield parameter_of(block, consumer).movedim(consumer.axis, -1).flatten(0, -2)


def expand_channels(scale: Tensor, channels: Tensor) -> Tensor:
    """Factors per source channel `[size]` to factors per consumer channel `[width]`; 1 where the channel is unknown."""
    channels = channels.to(scale.device)
    return torch.where(channels >= 0, scale[channels], 1.0)


def reduce_channels(values: Tensor, link: ChannelLink, reduce: str) -> Tensor:
    """Per consumer channel `[width]` to per source channel `[size]` by `reduce` (`mean` or `amax`); 0 where none is fed."""
    channels = link.channels.to(values.device)
    known = channels >= 0
    out = values.new_zeros(link.size)
    return out.scatter_reduce_(0, channels[known], values[known], reduce, include_self=False)


def broadcast_along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """`values` `[n]` shaped to broadcast along `axis` of `ndim` axes."""
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])

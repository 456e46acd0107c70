"""Moving a factor per channel from a producer into its consumers: the common part of AWQ and SmoothQuant.

    producer / s (weight and bias),   consumers * s      same function; the consumers' inputs are divided by s

Every fold is checked on the block itself (identity I6: transforms preserve the function), and reverted bit for bit if it fails.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....calibrate.channel_graph.links import ChannelLink, Consumer
from ....calibrate.model.architecture import weight_of
from ....calibrate.runner import Call

TOLERANCE = 1e-4  # of identity I6, relative to the largest output value, in float32


@dataclass(frozen=True)
class Rescale:
    """Factors `scale` `[link.size]`, positive, one per output channel of the link's producer; 1 leaves a channel unchanged."""

    link: ChannelLink
    scale: Tensor

    @property
    def columns(self) -> Tensor:
        """The factor of each input channel of the consumers `[width]`."""
        return expand_channels(self.scale, self.link.channels)


@torch.no_grad()
def fold(block: nn.Module, rescale: Rescale, stored: torch.dtype = torch.float32) -> Tensor:
    """Rescale the weights of producer and consumers in place. Returns the consumers' factors `[width]`, float64.

    `stored` is the dtype in which a norm's weight will be stored. It is rounded to it here, and the consumers get the factors
    of the rounded weight, so that a coarse dtype causes no error.
    """
    link, scale = rescale.link, rescale.scale.double()
    producer = block.get_submodule(link.producer)
    weight = producer.weight
    assert isinstance(weight, Tensor)
    if link.kind == "linear":
        weight_of(producer).div_(scale.to(weight).unsqueeze(1))
    else:
        offset = 1.0 if link.kind == "offset-norm" else 0.0
        gain = weight.double() + offset
        reduced = (gain / scale - offset).to(stored).to(weight.dtype)
        effective = gain / (reduced.double() + offset)
        scale = torch.where(effective.isfinite() & (effective > 0), effective, scale)
        weight.copy_(reduced)
    if isinstance(bias := getattr(producer, "bias", None), Tensor):
        bias.copy_(bias.double() / scale)
    columns = expand_channels(scale, link.channels)
    for consumer in link.consumers:
        parameter = parameter_of(block, consumer)
        parameter.mul_(broadcast_along(columns, consumer.axis, parameter.ndim).to(parameter))
    return columns


def fold_or_revert(
    block: nn.Module, rescale: Rescale, call: Call, hidden: Tensor, stored: torch.dtype = torch.float32
) -> float:
    """`fold`, reverted unless the block's output for `hidden` changes by at most `TOLERANCE`.

    `call` holds the other arguments of the block. Returns the largest change relative to the largest output value; above
    `TOLERANCE`, or NaN, the weights are unchanged.
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
    """Run `change`, which modifies `parameters` of the block; restore them if the block's output changes.

    Tolerance and return value are those of `fold_or_revert`.
    """
    before = [parameter.clone() for parameter in parameters]
    reference = call.replay(block, hidden)
    change()
    difference = relative_difference(call.replay(block, hidden), reference)
    if not difference <= TOLERANCE:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return difference


def relative_difference(output: Tensor, reference: Tensor) -> float:
    """The largest absolute difference divided by the largest value of `reference`; NaN if any value is not finite."""
    return float((output - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def folded_parameters(block: nn.Module, link: ChannelLink) -> list[Tensor]:
    """The parameters that `fold` modifies."""
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
    """Factors per producer channel `[size]` as factors per consumer channel `[width]`; 1 if the channel is unknown."""
    channels = channels.to(scale.device)
    return torch.where(channels >= 0, scale[channels], 1.0)


def reduce_channels(values: Tensor, link: ChannelLink, reduce: str) -> Tensor:
    """Values per consumer channel `[width]` as values per producer channel `[size]`, combined by `reduce` (`mean` or `amax`).

    0 for producer channels without a consumer channel.
    """
    channels = link.channels.to(values.device)
    known = channels >= 0
    out = values.new_zeros(link.size)
    return out.scatter_reduce_(0, channels[known], values[known], reduce, include_self=False)


def broadcast_along(values: Tensor, axis: int, ndim: int) -> Tensor:
    """`values` `[n]`, reshaped to broadcast along `axis` of a tensor with `ndim` axes."""
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])

"""Calibrated ranges of cached keys and values, from what a block hands to its cache on the calibration rows."""

import inspect
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import UsageError
from ..kernels.cache.ranges import KVRanges
from ..kernels.tensor.grid import fit_groups
from ..recipes.scheme import CacheScheme, QuantArgs
from .observers import Range
from .runner import Call

SAMPLE = 8192  # tokens that an observer which compares ranges looks at


@torch.no_grad()
def calibrate(block: nn.Module, batches: Iterable[tuple[Call, Tensor, Tensor | None]], scheme: CacheScheme) -> KVRanges:
    """The ends of the static ranges of `scheme` on the calibration `batches`, by its observers.

    Channels are those of all key-value heads, as the cache gets them (keys rotated). Raises `UsageError` for a block that hands
    its keys to no cache.
    """
    recorder = _Recorder()
    ranges = [_range(args) for args in (scheme.keys, scheme.values)]
    for call, hidden, mask in batches:
        for seen, each in zip(recorder.states(block, call, hidden), ranges, strict=True):
            if each is not None:
                each.update(seen if mask is None else seen[mask.flatten().bool()])
    return KVRanges(*(None if each is None else _ends(each) for each in ranges))


class _Observing(Protocol):
    def update(self, x: Tensor) -> None:
        """Take up the states of some tokens `[tokens, channels]`."""

    def ends(self) -> tuple[Tensor, Tensor] | None:
        """Both ends of the range; None where no token was seen."""


def _range(args: QuantArgs) -> _Observing | None:
    if args.dynamic:
        return None
    return Range(args) if args.strategy == "tensor" else _PerChannel(args)


def _ends(seen: _Observing) -> Tensor:
    low, high = seen.ends() or (torch.zeros(1), torch.zeros(1))
    return torch.stack([low.reshape(-1), high.reshape(-1)], 1)


class _PerChannel:
    """The range of every channel by `args.observer`, batch after batch."""

    def __init__(self, args: QuantArgs) -> None:
        self._args = args
        self._extremes: tuple[Tensor, Tensor] | None = None
        self._samples: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take up the states of some tokens `[tokens, channels]`."""
        low, high = x.amin(0), x.amax(0)
        if self._extremes is not None:
            low, high = torch.minimum(self._extremes[0], low), torch.maximum(self._extremes[1], high)
        self._extremes = low, high
        if self._args.observer == "mse" and sum(map(len, self._samples)) < SAMPLE:
            self._samples.append(x)

    def ends(self) -> tuple[Tensor, Tensor] | None:
        """Both ends of every channel's range, float32."""
        if not self._samples:
            return self._extremes
        scale, zero = fit_groups(torch.cat(self._samples).T, self._args)
        return -zero * scale, (self._args.maxq - zero) * scale


class _Recorder(DynamicCache):
    """A cache that keeps nothing and notes the states that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Note the states `[batch, heads, tokens, width]`."""
        self._seen.append((key_states, value_states))
        return key_states, value_states

    def states(self, block: nn.Module, call: Call, hidden: Tensor) -> list[Tensor]:
        """Keys and values of all tokens, each float32 `[rows * length, channels]`."""
        self._seen.clear()
        signature = inspect.signature(block.forward)
        arguments = signature.bind(hidden, *call.args, **call.kwargs)
        for name in signature.parameters:
            if "past" in name:  # past_key_values, in some blocks layer_past
                arguments.arguments[name] = self
        block(*arguments.args, **arguments.kwargs)
        if len(self._seen) != 1:
            raise UsageError(f"{type(block).__name__} hands its keys to no cache", "use dynamic: true for the cache")
        return [states.float().transpose(1, 2).flatten(2).flatten(0, 1) for states in self._seen[0]]

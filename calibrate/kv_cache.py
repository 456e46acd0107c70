"""Calibrated ranges of cached keys and values, from the states that a block passes to its cache on the calibration rows."""

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

SAMPLE = 8192  # number of tokens that the observer `mse` uses


@torch.no_grad()
def calibrate(block: nn.Module, batches: Iterable[tuple[Call, Tensor, Tensor | None]], scheme: CacheScheme) -> KVRanges:
    """The ends of the static ranges of `scheme` on the calibration `batches`, as its observers compute them.

    A batch is how the block is called, hidden states `[rows, length, width]`, and a mask of real tokens or None. Channels are
    those of all key-value heads, as the cache receives them (keys with rotary embedding). Raises `UsageError` if the block
    does not pass its keys to a cache.
    """
    recorder = _RecordingCache()
    observers = [_observer(args) for args in (scheme.keys, scheme.values)]
    for call, hidden, mask in batches:
        for states, observer in zip(recorder.states(block, call, hidden), observers, strict=True):
            if observer is not None:
                observer.update(states if mask is None else states[mask.flatten().bool()])
    return KVRanges(*(None if observer is None else _ends(observer) for observer in observers))


class _Observer(Protocol):
    def update(self, x: Tensor) -> None:
        """Take in the states of some tokens `[tokens, channels]`."""

    def ends(self) -> tuple[Tensor, Tensor] | None:
        """Both ends of the range; None if there was no token."""


def _observer(args: QuantArgs) -> _Observer | None:
    if args.dynamic:
        return None
    return Range(args) if args.strategy == "tensor" else _PerChannel(args)


def _ends(observer: _Observer) -> Tensor:
    low, high = observer.ends() or (torch.zeros(1), torch.zeros(1))
    return torch.stack([low.reshape(-1), high.reshape(-1)], 1)


class _PerChannel:
    """The range of every channel by `args.observer`, updated batch by batch."""

    def __init__(self, args: QuantArgs) -> None:
        self._args = args
        self._extremes: tuple[Tensor, Tensor] | None = None
        self._samples: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take in the states of some tokens `[tokens, channels]`."""
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


class _RecordingCache(DynamicCache):
    """A cache that records the states passed to it and returns them unchanged, without those of earlier calls."""

    def __init__(self) -> None:
        super().__init__()
        self._recorded: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Record the states `[batch, heads, tokens, width]`."""
        self._recorded.append((key_states, value_states))
        return key_states, value_states

    def states(self, block: nn.Module, call: Call, hidden: Tensor) -> list[Tensor]:
        """Keys and values of all tokens, each float32 `[rows * length, channels]`."""
        self._recorded.clear()
        signature = inspect.signature(block.forward)
        arguments = signature.bind(hidden, *call.args, **call.kwargs)
        for name in signature.parameters:
            if "past" in name:  # past_key_values, in some blocks layer_past
                arguments.arguments[name] = self
        block(*arguments.args, **arguments.kwargs)
        if len(self._recorded) != 1:
            raise UsageError(
                f"{type(block).__name__} does not pass its keys to a cache, so their ranges cannot be calibrated",
                "use dynamic: true for the cache",
            )
        return [states.float().transpose(1, 2).flatten(2).flatten(0, 1) for states in self._recorded[0]]

"""Calibrated ranges of cached keys: for every channel the ends between which all tokens to come are kept.

Keys are loud in channels that stay the same from token to token, so that a scale per channel can be found beforehand: nothing
has to be fitted while a model generates, and no scales are kept but these. A file of its own holds them, in safetensors'
format under another suffix, since runtimes that take every `*.safetensors` of a folder for weights would stumble over it.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ...calibrate.runner import Call
from ...compress.errors import CompressError, UsageError
from ...compress.formats import shards
from ...compress.grid import fit_groups
from ...compress.scheme import QuantArgs

KEY_RANGES = "key_ranges.lmpress"
SAMPLE = 8192  # tokens that an observer which compares ranges looks at
ATTRIBUTE = "lmpress_key_ranges"  # of a loaded model


@torch.no_grad()
def key_range(block: nn.Module, batches: Iterable[tuple[Call, Tensor, Tensor | None]], args: QuantArgs) -> Tensor:
    """The ends of every key channel's range on the calibration `batches`, by `args.observer`: float32 `[channels, 2]`.

    Channels are those of all key-value heads, as the cache gets them (rotated). Raises `UsageError` for a block that hands
    its keys to no cache.
    """
    recorder = _Recorder()
    low = high = torch.zeros(())
    samples: list[Tensor] = []
    for count, (call, hidden, mask) in enumerate(batches):
        keys = recorder.keys(block, call, hidden)
        keys = keys if mask is None else keys[mask.flatten().bool()]
        ends = keys.amin(0), keys.amax(0)
        low, high = ends if count == 0 else (torch.minimum(low, ends[0]), torch.maximum(high, ends[1]))
        if args.observer == "mse" and sum(map(len, samples)) < SAMPLE:
            samples.append(keys)
    if samples:
        scale, zero = fit_groups(torch.cat(samples).T, args)
        low, high = -zero * scale, (args.maxq - zero) * scale
    return torch.stack([low, high], 1)


class _Recorder(DynamicCache):
    """A cache that keeps nothing and notes the keys that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Note the keys `[batch, heads, tokens, width]`."""
        self.seen.append(key_states)
        return key_states, value_states

    def keys(self, block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
        """The keys of all tokens, float32 `[rows * length, channels]`."""
        self.seen.clear()
        signature = inspect.signature(block.forward)
        arguments = signature.bind(hidden, *call.args, **call.kwargs)
        for name in signature.parameters:
            if "past" in name:  # past_key_values, in some blocks layer_past
                arguments.arguments[name] = self
        block(*arguments.args, **arguments.kwargs)
        if len(self.seen) != 1:
            raise UsageError(f"{type(block).__name__} hands its keys to no cache", "use dynamic: true for the keys")
        return self.seen[0].float().transpose(1, 2).flatten(2).flatten(0, 1)


def write_ranges(file: Path, ranges: dict[int, Tensor]) -> None:
    """Store the ranges `[channels, 2]` by layer."""
    shards.write(file, {f"layers.{index}": ends.cpu().contiguous() for index, ends in sorted(ranges.items())})


def read_ranges(file: Path) -> list[Tensor]:
    """The ranges of all layers, in their order. Raises `CompressError` where they are not there or not whole."""
    remedy = "fetch the checkpoint again, or load it with kv_bits=16"
    if not file.is_file():
        raise CompressError(f"{file} is missing: the checkpoint's cache has calibrated keys", remedy)
    stored = shards.read(file)
    names = [f"layers.{index}" for index in range(len(stored))]
    if set(names) != set(stored) or any(ends.ndim != 2 or ends.shape[1] != 2 for ends in stored.values()):
        raise CompressError(f"{file} does not hold the key ranges of layers 0 to {len(stored) - 1}", remedy)
    return [stored[name] for name in names]


def attach(model: PreTrainedModel, ranges: list[Tensor]) -> None:
    """Have packed caches of `model` use these ranges."""
    setattr(model, ATTRIBUTE, [ends.to(model.device) for ends in ranges])


def attached(model: PreTrainedModel) -> list[Tensor]:
    """The ranges that packed caches of `model` use. Raises `UsageError` where it has none."""
    ranges = getattr(model, ATTRIBUTE, None)
    if ranges is None:
        raise UsageError(
            "static scales of keys need calibrated ranges", "load the checkpoint that has them, by its path"
        )
    return ranges

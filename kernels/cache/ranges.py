"""Calibrated ranges of cached keys and values: the limits to which the states of all later tokens are clamped.

The outliers of keys are in the same channels for all tokens, so that a scale per channel can be calibrated; other runtimes have
one scale for all keys and one for all values. Nothing has to be fitted while a model generates, and no other scales are
stored.
"""

from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UsageError

ATTRIBUTE = "lmpress_cache_ranges"  # of a loaded model


class KVRanges(NamedTuple):
    """The low and high ends of one layer's ranges: float32 `[channels, 2]`, or `[1, 2]` for all channels together; None if the
    ranges are computed while the model generates (dynamic)."""

    keys: Tensor | None
    values: Tensor | None


def attach(model: PreTrainedModel, ranges: list[KVRanges]) -> None:
    """Set the ranges that packed caches of `model` use, one per layer, moved to the device of `model`."""
    placed = [KVRanges(*(None if ends is None else ends.to(model.device) for ends in layer)) for layer in ranges]
    setattr(model, ATTRIBUTE, placed)


def attached(model: PreTrainedModel) -> list[KVRanges]:
    """The ranges that packed caches of `model` use, one per layer. Raises `UsageError` if it has none."""
    ranges = getattr(model, ATTRIBUTE, None)
    if ranges is None:
        raise UsageError(
            "a KV cache with static scales needs calibrated ranges, and this model has none",
            "load a checkpoint that was calibrated with this cache scheme",
        )
    return ranges

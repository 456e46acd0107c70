"""Calibrated ranges of cached keys and values: the ends between which all tokens to come are kept.

Keys are loud in channels that stay the same from token to token, so that a scale per channel can be found beforehand; one scale
for all keys, and one for all values, is what other runtimes know. Nothing has to be fitted while a model generates, and no
scales are kept but these.
"""

from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UsageError

ATTRIBUTE = "lmpress_cache_ranges"  # of a loaded model


class KVRanges(NamedTuple):
    """The low and high ends of one layer's ranges: float32 `[channels, 2]`, or `[1, 2]` of all channels together. None where
    ranges are found while the model generates."""

    keys: Tensor | None
    values: Tensor | None


def attach(model: PreTrainedModel, ranges: list[KVRanges]) -> None:
    """Have packed caches of `model` use these ranges."""
    placed = [KVRanges(*(None if ends is None else ends.to(model.device) for ends in layer)) for layer in ranges]
    setattr(model, ATTRIBUTE, placed)


def attached(model: PreTrainedModel) -> list[KVRanges]:
    """The ranges that packed caches of `model` use. Raises `UsageError` where it has none."""
    ranges = getattr(model, ATTRIBUTE, None)
    if ranges is None:
        raise UsageError(
            "static scales of a cache need calibrated ranges", "load the checkpoint that has them, by its path"
        )
    return ranges

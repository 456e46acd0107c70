"""The packed KV cache of a transformers model: codes in memory, not rounded floats."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ...errors import UsageError
from ...recipes.scheme import CacheScheme, QuantArgs
from ..activations import fake_quantize
from ..tensor.grid import parameters
from .packed import PackedStates
from .ranges import KVRanges, attached

DYNAMIC = KVRanges(None, None)


class PackedLayer(DynamicLayer):
    """The past of one attention layer: packed keys and values, and the window of the latest tokens in full precision (`keys`,
    `values`).

    A pass reads what was packed before it, so a prompt attends to itself in full precision. What a later token reads depends
    only on the number of tokens before it, not on the passes in which they were added.
    """

    is_croppable = False  # `crop` into the packed part returns rounded tokens

    def __init__(self, scheme: CacheScheme, ends: KVRanges = DYNAMIC) -> None:
        super().__init__()
        self.scheme = scheme
        self.ends = ends
        self.packed: tuple[PackedStates, PackedStates] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the states `[batch, heads, tokens, width]` of new tokens; returns all keys and values, oldest first."""
        past = self._unpacked(key_states.dtype)
        keys, values = super().update(key_states, value_states)
        count = self.scheme.packed(self.get_seq_length()) - self._packed_tokens
        if count:
            self._pack(count)
        return (keys, values) if past is None else (torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2))

    def get_seq_length(self) -> int:
        """The number of stored tokens, packed or not."""
        return self._packed_tokens + super().get_seq_length()

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self.packed = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; the remaining tokens of a packed step that is cut stay rounded."""
        removed = -tokens_to_remove
        if removed <= 0 or not self.is_initialized:
            super().crop(tokens_to_remove)
            return
        left = max(0, self.get_seq_length() - removed)
        past, packed = self._unpacked(self._window[0].dtype), self._packed_tokens
        if past is not None and self.packed is not None and left < packed:
            whole = left // self.scheme.step * self.scheme.step
            self.keys, self.values = (states[:, :, whole:left] for states in past)
            for states in self.packed:
                states.truncate(whole)
            self.packed = self.packed if whole else None
        else:
            self.keys, self.values = (states[:, :, : left - packed] for states in self._window)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self._window[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` of the batch."""
        if self.is_initialized:
            indices = indices.to(self._window[0].device)
            self.keys, self.values = (states[indices] for states in self._window)
            for states in self.packed or ():
                states.select(indices)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed states, their scales, and the window."""
        window = self._window if self.is_initialized else ()
        return sum(states.nbytes for states in (*window, *(self.packed or ())))

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same tokens in full precision."""
        window = self._window if self.is_initialized else ()
        token = sum(states.shape[0] * states.shape[1] * states.shape[3] * states.itemsize for states in window)
        return token * self.get_seq_length()

    @property
    def _window(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    @property
    def _packed_tokens(self) -> int:
        return 0 if self.packed is None else self.packed[0].tokens

    def _unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        return None if self.packed is None else (self.packed[0].states(dtype), self.packed[1].states(dtype))

    def _pack(self, count: int) -> None:
        """Move the first `count` tokens of the window into the packed part."""
        old = [states[:, :, :count] for states in self._window]
        keys = _packed(old[0], self.scheme.keys, self.ends.keys, self.scheme.keys.strategy == "group")
        values = _packed(old[1], self.scheme.values, self.ends.values, along_tokens=False)
        self.keys, self.values = (states[:, :, count:].clone() for states in self._window)
        if self.packed is None:
            self.packed = keys, values
        else:
            self.packed[0].append(keys)
            self.packed[1].append(values)


def _packed(states: Tensor, args: QuantArgs, ends: Tensor | None, along_tokens: bool) -> PackedStates:
    return PackedStates.of(states, args, along_tokens) if ends is None else PackedStates.within(states, args, ends)


class PackedCache(Cache):
    """A transformers cache whose layers store past tokens by `scheme`, for a model with this `config`.

    A static scheme needs the calibrated `ranges` of every layer. Raises `UsageError` if their number is wrong, or if a layer of
    the model does not store all keys and values (sliding windows, recurrent states).
    """

    def __init__(self, config: PreTrainedConfig, scheme: CacheScheme, ranges: Sequence[KVRanges] | None = None) -> None:
        count = check_cache(config)
        if scheme.static and (ranges is None or len(ranges) != count):
            given = 0 if ranges is None else len(ranges)
            raise UsageError(
                f"a KV cache with static scales needs the ranges of {count} layers, got {given}", "use dynamic: true"
            )
        super().__init__(
            layers=[PackedLayer(scheme, ranges[i] if scheme.static and ranges else DYNAMIC) for i in range(count)]
        )

    @classmethod
    def of(cls, model: PreTrainedModel, scheme: CacheScheme) -> "PackedCache":
        """An empty cache of `model`, with the ranges that were loaded with it if the scheme is static.

        Raises `UsageError` as `PackedCache` and `attached` do.
        """
        return cls(model.config, scheme, attached(model) if scheme.static else None)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tokens."""
        return sum(layer.nbytes for layer in self._layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same tokens in full precision."""
        return sum(layer.dense_nbytes for layer in self._layers)

    @property
    def _layers(self) -> list[PackedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]


def check_cache(config: PreTrainedConfig) -> int:
    """The number of attention layers of a model whose cache can be packed.

    Raises `UsageError` if a layer of the model does not store all keys and values (sliding windows, recurrent states).
    """
    layers = DynamicCache(config=config).layers
    for index, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            raise UsageError(
                f"the KV cache of {config.model_type} cannot be packed: layer {index} is a {type(layer).__name__}",
                "leave its cache in full precision",
            )
    return len(layers)


def serve_cache(model: PreTrainedModel, scheme: CacheScheme) -> None:
    """Make `model` use a packed cache with this `scheme` whenever it would create one itself: in `generate`, and when called.

    An empty `DynamicCache` is replaced with a packed one, which the model returns; a cache that has tokens, or of another type,
    is used as it is. Raises `UsageError` as `PackedCache` does.
    """
    check_cache(model.config)
    _serve(model, lambda: PackedCache.of(model, scheme))


def serve_rounded(model: PreTrainedModel, scheme: CacheScheme, ranges: Sequence[KVRanges]) -> None:
    """Make `model` do what compressed-tensors does with a scheme that `is_shared`: every key and value is rounded when it is
    added, before the prompt itself reads it, and stored as a float."""
    _serve(model, lambda: _Rounded(model.config, scheme, ranges))


class _Rounded(DynamicCache):
    """Keys and values rounded to the grids of their layer's `ranges`."""

    def __init__(self, config: PreTrainedConfig, scheme: CacheScheme, ranges: Sequence[KVRanges]) -> None:
        super().__init__(config=config)
        self._scheme, self._ranges = scheme, ranges

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens `[batch, heads, tokens, width]`."""
        rounded = []
        for states, each, ends in zip(
            (key_states, value_states), (self._scheme.keys, self._scheme.values), self._ranges[layer_idx], strict=True
        ):
            assert ends is not None
            rounded.append(fake_quantize(states, each, parameters(ends[:, 0], ends[:, 1], each)))
        return super().update(*rounded, layer_idx, *args, **kwargs)


def _serve(model: PreTrainedModel, make: Callable[[], Cache]) -> None:
    def replace_cache(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        past, wanted = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if wanted is None:
            wanted = getattr(model.config.get_text_config(), "use_cache", True)
        if wanted and (past is None or (type(past) is DynamicCache and past.get_seq_length() == 0)):
            kwargs = kwargs | {"past_key_values": make()}
        return args, kwargs

    model.register_forward_pre_hook(replace_cache, with_kwargs=True)

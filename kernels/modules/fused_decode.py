"""Fused single-token decoding: two C calls per block instead of about eighty torch operations.

Text is generated one token at a time, and small products take less time than Python needs to start the next one. The model's
code still runs for any input other than one token of one sequence, and for every block that the kernels cannot compute: its
family must be listed, its products must be packed, and its first token must give what the model's code gives.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..cpu import library
from ..cpu.product import CpuProduct
from .linear import PackedLinear

# Architectures whose blocks are computed as in native/decoder_block.h, with or without biases and norms of heads.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "seed_oss", "smollm3"})
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# The largest error for the first token, relative to what a block adds to it: for exact products, and for inputs in int8.
EXACT, ROUNDED = 1e-5, 1e-2
CARRIED = 1e-7  # relative to the hidden state that the block adds to: the precision of float32


def fuse_decode_layers(model: nn.Module) -> None:
    """Decode single tokens by the compiled kernels in every block of `model` that they can compute."""
    if getattr(model.config, "model_type", None) not in FAMILIES:
        return
    for layer in list(model.modules()):
        if _linears(layer) is not None:
            layer.forward = FusedDecodeLayer(layer)  # type: ignore[method-assign]


def blocks_of(model: nn.Module) -> dict[str, int]:
    """How many blocks of `model` decode single tokens by the compiled kernels: counts of `fused`, `refused` (the comparison
    failed) and `untried` (no token yet)."""
    layers = [
        each for module in model.modules() if isinstance(each := module.__dict__.get("forward"), FusedDecodeLayer)
    ]
    names = {True: "fused", False: "refused", None: "untried"}
    return {name: count for fits, name in names.items() if (count := sum(layer.fits is fits for layer in layers))}


class FusedDecodeLayer:
    """The `forward` of a decoder layer: compiled for one token of one sequence, the layer's code for all other inputs.

    fits  whether the compiled block computes what the layer does; None before the first token
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.fits: bool | None = None
        self._parts: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]] = []
        self._block: library.Block | None = None

    def __call__(self, hidden_states: Tensor, *places: Any, **given: Any) -> Tensor:
        single = self.fits is not False and not places and _is_single(hidden_states, given)
        block = self._ready() if single else None
        if block is None:
            return self._original(hidden_states, *places, **given)
        if self.fits is None:
            return self._compare(block, hidden_states, given)
        return self._decode(block, hidden_states, given["position_embeddings"], given["past_key_values"])

    def __getstate__(self) -> dict[str, Any]:
        """The state without addresses, which are not valid in a copy."""
        return self.__dict__ | {"_block": None, "_parts": []}

    def _original(self, x: Tensor, *places: Any, **given: Any) -> Tensor:
        return type(self.layer).forward(self.layer, x, *places, **given)

    def _decode(self, block: library.Block, x: Tensor, angles: tuple[Tensor, Tensor], past: Any) -> Tensor:
        queries, keys, values = block.project(x, *angles)
        keys, values = past.update(keys, values, self.layer.self_attn.layer_idx)
        return block.attend(x, queries, keys, values)

    def _compare(self, block: library.Block, x: Tensor, given: dict[str, Any]) -> Tensor:
        """The output of the layer's code for the first token; sets `fits` by comparing the compiled block with it."""
        angles, recording = given["position_embeddings"], RecordingCache(given["past_key_values"])
        expected = self._original(x, **given | {"past_key_values": recording})
        bound = EXACT if self.layer.self_attn.q_proj.activations == "float" else ROUNDED
        self.fits = (
            isinstance(expected, Tensor) and recording.past is not None and angles[0].shape[-1] == block.head_size
        )
        if self.fits:
            output = self._decode(block, x, angles, recording)
            (expected_keys, expected_values), (keys, values) = recording.updates[:2]
            added = (expected - x).norm() + CARRIED / bound * x.norm()
            pairs = (
                (output, expected, added),
                (keys, expected_keys, expected_keys.norm()),
                (values, expected_values, expected_values.norm()),
            )
            self.fits = all(a.shape == b.shape and bool((a - b).norm() <= bound * size) for a, b, size in pairs)
        return expected

    def _ready(self) -> library.Block | None:
        """The compiled block of the layer's present modules, which moves and casts of the model replace. None if a module
        inside has hooks, which the compiled block would not call, or if a linear layer is not packed."""
        if not self._parts or any(places.get(name) is not part for places, name, part in self._parts):
            self._block = _block(self.layer)
            self._parts = [(each._modules, *part) for each in self.layer.modules() for part in each._modules.items()]
        watched = any(part._forward_hooks or part._forward_pre_hooks for *_, part in self._parts if part is not None)
        return None if watched else self._block


class RecordingCache:
    """A cache that records the keys and values of every update, and is updated once: later updates return the same past."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.updates: list[tuple[Tensor, Tensor]] = []
        self.past: tuple[Tensor, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **given: Any) -> tuple[Tensor, Tensor]:
        """Record `keys` and `values`; the first call updates the cache."""
        self.updates.append((keys, values))
        past = self.past = self.past or self.cache.update(keys, values, *args, **given)
        return past


def _is_single(x: Tensor, given: dict[str, Any]) -> bool:
    """Whether this is one token of one sequence that attends to its whole past, without a request for attention weights."""
    return (
        x.shape[:2] == (1, 1)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and given.get("attention_mask") is None
        and given.get("past_key_values") is not None
        and given.get("position_embeddings") is not None
        and not given.get("output_attentions")
    )


def _linears(layer: nn.Module) -> list[PackedLinear] | None:
    """The seven packed layers of a block if the compiled kernels serve all of them with the same settings, else None."""
    attention, mlp = (layer._modules.get(name) for name in ("self_attn", "mlp"))
    if attention is None or mlp is None:
        return None
    found = [*(attention._modules.get(name) for name in ATTENTION), *(mlp._modules.get(name) for name in MLP)]
    fits = all(type(each) is PackedLinear and type(each.product) is CpuProduct for each in found)
    return found if fits and len({each.product.settings for each in found}) == 1 else None  # type: ignore[union-attr, return-value]


def _block(layer: nn.Module) -> library.Block | None:
    """The layer prepared for the compiled kernels; None if a part is missing, as in another version of its family."""
    linears: list[Any] | None = _linears(layer)
    if linears is None:
        return None
    attention: Any = layer.self_attn
    heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    try:
        norms = [layer.input_layernorm, layer.post_attention_layernorm, *heads]
        weights = [None if norm is None else (norm.weight.detach(), norm.variance_epsilon) for norm in norms]
        shape = attention.head_dim, attention.scaling
    except AttributeError:
        return None
    biases = [None if each.bias is None else each.bias.detach() for each in linears]
    return library.Block([each.product.call for each in linears], biases, weights, *shape)

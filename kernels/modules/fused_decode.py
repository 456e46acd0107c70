"""Fused single-token decoding: two C calls per block instead of about eighty torch operations.

Text is written a token at a time, and small products are over sooner than Python has asked for the next one. What is not one
token of one sequence goes the model's own way, and so does every block that is not what the kernels compute: its family must
be listed, its products must be packed, and its first token must come out as the model's own code has it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..cpu import library
from ..cpu.product import CpuProduct
from .linear import PackedLinear

# Architectures whose blocks are the one that the C file draws, with or without biases and norms of heads.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "seed_oss", "smollm3"})
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
# How far the first token may be off, in shares of what a block adds to it: exact products, and those of inputs in int8.
EXACT, ROUNDED = 1e-5, 1e-2
CARRIED = 1e-7  # of what the block passes on: float32 knows it no better


def fuse_decode_layers(model: nn.Module) -> None:
    """Let every block of `model` that can answer single tokens by the compiled kernels."""
    if getattr(model.config, "model_type", None) not in FAMILIES:
        return
    for layer in list(model.modules()):
        if _linears(layer) is not None:
            layer.forward = FusedDecodeLayer(layer)  # type: ignore[method-assign]


def blocks_of(model: nn.Module) -> dict[str, int]:
    """How many blocks of `model` answer single tokens by the compiled kernels: counts of `fused`, `refused` by trial and
    `untried`, which no token has met yet."""
    ways = [way for module in model.modules() if isinstance(way := module.__dict__.get("forward"), FusedDecodeLayer)]
    names = {True: "fused", False: "refused", None: "untried"}
    return {name: count for fits, name in names.items() if (count := sum(way.fits is fits for way in ways))}


class FusedDecodeLayer:
    """The `forward` of a decoder layer: the compiled block's for one token of one sequence, the layer's own for all else.

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
            return self._own(hidden_states, *places, **given)
        if self.fits is None:
            return self._first(block, hidden_states, given)
        return self._answer(block, hidden_states, given["position_embeddings"], given["past_key_values"])

    def __getstate__(self) -> dict[str, Any]:
        """Addresses are not copied."""
        return self.__dict__ | {"_block": None, "_parts": []}

    def _own(self, x: Tensor, *places: Any, **given: Any) -> Tensor:
        return type(self.layer).forward(self.layer, x, *places, **given)

    def _answer(self, block: library.Block, x: Tensor, angles: tuple[Tensor, Tensor], past: Any) -> Tensor:
        queries, keys, values = block.project(x, *angles)
        keys, values = past.update(keys, values, self.layer.self_attn.layer_idx)
        return block.attend(x, queries, keys, values)

    def _first(self, block: library.Block, x: Tensor, given: dict[str, Any]) -> Tensor:
        """The layer's own answer, which decides whether the compiled block's will do."""
        angles, witness = given["position_embeddings"], RecordingCache(given["past_key_values"])
        own = self._own(x, **given | {"past_key_values": witness})
        bound = EXACT if self.layer.self_attn.q_proj.activations == "float" else ROUNDED
        self.fits = isinstance(own, Tensor) and witness.past is not None and angles[0].shape[-1] == block.head_size
        if self.fits:
            mine = self._answer(block, x, angles, witness)
            (keys, values), (own_keys, own_values) = witness.given[1], witness.given[0]
            added = (own - x).norm() + CARRIED / bound * x.norm()
            pairs = ((mine, own, added), (keys, own_keys, own_keys.norm()), (values, own_values, own_values.norm()))
            self.fits = all(a.shape == b.shape and bool((a - b).norm() <= bound * size) for a, b, size in pairs)
        return own

    def _ready(self) -> library.Block | None:
        """The block for what the layer is made of now: moves and casts of the model put other products in place. None if
        hooks within wait for calls that the block does not make, or not all of it is packed."""
        if not self._parts or any(places.get(name) is not part for places, name, part in self._parts):
            self._block = _block(self.layer)
            self._parts = [(each._modules, *part) for each in self.layer.modules() for part in each._modules.items()]
        watched = any(part._forward_hooks or part._forward_pre_hooks for *_, part in self._parts if part is not None)
        return None if watched else self._block


class RecordingCache:
    """A cache that remembers what it was given by whom asked first and second, and answers both with the same past."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.given: list[tuple[Tensor, Tensor]] = []
        self.past: tuple[Tensor, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **given: Any) -> tuple[Tensor, Tensor]:
        """The cache's own update, made once."""
        self.given.append((keys, values))
        past = self.past = self.past or self.cache.update(keys, values, *args, **given)
        return past


def _is_single(x: Tensor, given: dict[str, Any]) -> bool:
    """Whether this is one token of one sequence, nothing of whose past is hidden from it, and nobody asks for more."""
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
    """The seven packed layers of a block whose products all are the compiled kernels', and take their inputs alike."""
    attention, mlp = (layer._modules.get(name) for name in ("self_attn", "mlp"))
    if attention is None or mlp is None:
        return None
    found = [*(attention._modules.get(name) for name in ATTENTION), *(mlp._modules.get(name) for name in MLP)]
    fits = all(type(each) is PackedLinear and type(each.product) is CpuProduct for each in found)
    return found if fits and len({each.product.how for each in found}) == 1 else None  # type: ignore[union-attr, return-value]


def _block(layer: nn.Module) -> library.Block | None:
    """The layer as the C file draws it; None if it has no such part, as another version of its family may."""
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

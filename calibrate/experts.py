"""Mixtures of experts: every expert as linear layers of its own.

transformers keeps the experts of a layer in two three-dimensional parameters, which have no inputs to observe and no place
for a packed weight. Here each expert becomes three linear layers; the layer around them calls them as before.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Expert(nn.Module):
    """The weights of one gated feed-forward network."""

    def __init__(self, hidden: int, inner: int, like: Tensor) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "dtype": like.dtype, "device": like.device}
        self.gate_proj = nn.Linear(hidden, inner, **options)
        self.up_proj = nn.Linear(hidden, inner, **options)
        self.down_proj = nn.Linear(inner, hidden, **options)


class Experts(nn.ModuleList):
    """Takes the place of a fused module: called with hidden states, the experts chosen for each token, and their weights."""

    def __init__(self, fused: Any) -> None:
        count, hidden, inner = fused.down_proj.shape
        super().__init__(Expert(hidden, inner, fused.down_proj) for _ in range(count))
        self._gated = (fused,)  # in a tuple, so that its parameters are not this module's

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states` `[tokens, hidden]`, `top_k_index` and `top_k_weights` `[tokens, k]`; returns `[tokens, hidden]`."""
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            assert isinstance(expert, Expert)
            token, place = torch.where(top_k_index == index)
            if not len(token):
                continue
            inputs = hidden_states[token]
            inner = self._gated[0]._apply_gate(torch.cat([expert.gate_proj(inputs), expert.up_proj(inputs)], dim=-1))
            output = expert.down_proj(inner) * top_k_weights[token, place, None]
            total.index_add_(0, token, output.to(total.dtype))
        return total


def unfuse(model: nn.Module) -> None:
    """Replace every fused module of experts in `model`, whose parameters are on the meta device, by `Experts`.

    Interleaved, transposed or biased layouts stay as they are.
    """
    for name, module in list(model.named_modules()):
        if is_fused(module):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Experts(module))


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds gated experts in the layout `[experts, 2 inner, hidden]` and `[experts, hidden, inner]`."""
    plain = not any(getattr(module, flag, True) for flag in ("has_bias", "is_transposed", "has_post_expert_norm"))
    gated = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    return bool(plain and gated and set(dict(module.named_parameters())) == PARTS.keys())


def routers(block: nn.Module) -> set[nn.Module]:
    """The linear layers beside experts that choose among them or weigh a shared one: too small and too delicate to touch."""
    found: set[nn.Module] = set()
    for module in block.modules():
        experts = next((child for child in module.children() if isinstance(child, Experts)), None)
        if experts is not None:
            found |= {c for c in module.children() if isinstance(c, nn.Linear) and c.out_features in (1, len(experts))}
    return found


def stored_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The model's name of each checkpoint tensor that goes by another one, by transformers' own conversion tables."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    names = {}
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters)
        if pattern is not None:
            renamed = _expert_name(name, renamed, pattern, converters)
        if renamed != name:
            names[renamed] = name
    return names


def plain_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What each weight of an expert among the model's `names` is called in a checkpoint that transformers reads, where that
    differs: the inverse of `stored_names`."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    found = {}
    for name in names:
        match = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            continue
        parent, number, part = match.groups()
        for candidate in _candidates(parent, number, part, converters):
            if candidate != name and stored_names(model, [candidate]).get(name) == candidate:
                found[name] = candidate
    return found


def _candidates(parent: str, number: str, part: str, converters: list[WeightConverter]) -> Iterator[str]:
    for leaf, parts in PARTS.items():
        for converter in converters:
            merged = any(target.endswith(f".{leaf}") for target in converter.target_patterns)
            if part in parts and merged and len(converter.source_patterns) == len(parts):
                pattern = converter.source_patterns[parts.index(part)].replace("*", number)
                yield f"{parent}.{pattern[pattern.index('experts.') :]}"


def _expert_name(stored: str, fused: str, pattern: str, converters: list[WeightConverter]) -> str:
    """`...experts.3.up_proj.weight` for the tensor `stored` that transformers would merge into the parameter `fused`."""
    experts, _, leaf = fused.rpartition(".")
    sources = next(c.source_patterns for c in converters if pattern in c.source_patterns)
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), stored)
    parts = PARTS.get(leaf, ())
    if number is None or len(parts) != len(sources):
        return fused
    return f"{experts}.{number.group(1)}.{parts[sources.index(pattern)]}.weight"

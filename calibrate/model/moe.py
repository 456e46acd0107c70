"""Mixtures of experts: every expert as linear layers of its own.

transformers keeps the experts of a layer in two three-dimensional parameters, which have no inputs to observe and no place
for a packed weight. Here each expert becomes three linear layers; the layer around them calls them as before.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

FUSED_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class GatedMLP(nn.Module):
    """The weights of one gated feed-forward network."""

    def __init__(self, hidden: int, inner: int, like: Tensor) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "dtype": like.dtype, "device": like.device}
        self.gate_proj = nn.Linear(hidden, inner, **options)
        self.up_proj = nn.Linear(hidden, inner, **options)
        self.down_proj = nn.Linear(inner, hidden, **options)


class SplitExperts(nn.ModuleList):
    """Takes the place of a fused module: called with hidden states, the experts chosen for each token, and their weights."""

    def __init__(self, fused: Any) -> None:
        count, hidden, inner = fused.down_proj.shape
        super().__init__(GatedMLP(hidden, inner, fused.down_proj) for _ in range(count))
        self._gated = (fused,)  # in a tuple, so that its parameters are not this module's

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states` `[tokens, hidden]`, `top_k_index` and `top_k_weights` `[tokens, k]`; returns `[tokens, hidden]`."""
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            assert isinstance(expert, GatedMLP)
            token, place = torch.where(top_k_index == index)
            if not len(token):
                continue
            inputs = hidden_states[token]
            inner = self._gated[0]._apply_gate(torch.cat([expert.gate_proj(inputs), expert.up_proj(inputs)], dim=-1))
            output = expert.down_proj(inner) * top_k_weights[token, place, None]
            total.index_add_(0, token, output.to(total.dtype))
        return total


def split_fused_experts(model: nn.Module) -> None:
    """Replace every fused module of experts in `model`, whose parameters are on the meta device, by `SplitExperts`.

    Interleaved, transposed or biased layouts stay as they are.
    """
    for name, module in list(model.named_modules()):
        if is_fused(module):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SplitExperts(module))


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds gated experts in the layout `[experts, 2 inner, hidden]` and `[experts, hidden, inner]`."""
    plain = not any(getattr(module, flag, True) for flag in ("has_bias", "is_transposed", "has_post_expert_norm"))
    gated = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    return bool(plain and gated and set(dict(module.named_parameters())) == FUSED_PARTS.keys())


def routers(block: nn.Module) -> set[nn.Module]:
    """The layers beside experts that choose among them or weigh a shared one: too small and too delicate to touch."""
    found: set[nn.Module] = set()
    for module in block.modules():
        experts = next((child for child in module.children() if isinstance(child, SplitExperts)), None)
        if experts is not None:
            weights = {child: getattr(child, "weight", None) for child in module.children()}
            found |= {c for c, w in weights.items() if isinstance(w, Tensor) and len(w) in (1, len(experts))}
    return found


def stored_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The model's name of each checkpoint tensor that goes by another one, by transformers' own conversion tables."""
    return _stored_names(stored, *_conversions(model))


def _conversions(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [t for t in transforms if isinstance(t, WeightRenaming)], [
        t for t in transforms if isinstance(t, WeightConverter)
    ]


def _stored_names(
    stored: Iterable[str], renamings: list[WeightRenaming], converters: list[WeightConverter]
) -> dict[str, str]:
    names = {}
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters)
        if pattern is not None:
            renamed = _expert_name(name, renamed, pattern, converters)
        if renamed != name:
            names[renamed] = name
    return names


def checkpoint_module_names(model: PreTrainedModel, modules: Iterable[str]) -> dict[str, str]:
    """What each of the model's `modules` in a mixture of experts is called in checkpoints that others read, where that differs,
    such as `...block_sparse_moe.experts.0.w1`. The inverse of `model_names`."""
    mixtures = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if any(isinstance(c, SplitExperts) for c in module.children())
    )
    renamings, converters = _conversions(model)
    found = {}
    for module in modules:
        weight = f"{module}.weight"
        if module.startswith(mixtures):
            candidates = _candidates(weight, renamings, converters)
            plain = (c for c in candidates if _stored_names([c], renamings, converters).get(weight) == c)
            found[module] = next(plain, weight).removesuffix(".weight")
    return {module: called for module, called in found.items() if called != module}


def renamed(name: str, modules: Mapping[str, str]) -> str:
    """The tensor's `name` where its module is one of `modules`, which go by other names."""
    module, _, part = name.rpartition(".")
    return f"{modules[module]}.{part}" if module in modules else name


def model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The model's name of each stored tensor of a layer in a mixture of experts that goes by another one, packed or not."""
    renamings, converters = _conversions(model)
    modules = {name: name.rpartition(".")[0] for name in stored}
    weights = {f"{module}.weight" for module in modules.values()}
    own = {plain: name for name, plain in _stored_names(weights, renamings, converters).items()}
    return {
        name: own[f"{module}.weight"].removesuffix("weight") + name.rpartition(".")[2]
        for name, module in modules.items()
        if own.get(f"{module}.weight", "").endswith(".weight")
    }


def _candidates(weight: str, renamings: list[WeightRenaming], converters: list[WeightConverter]) -> Iterator[str]:
    """What the model's `weight` may have been called before transformers renamed and merged it; the likeliest first."""
    names = [weight]
    match = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", weight)
    if match is not None:
        parent, number, part = match.groups()
        for leaf, parts in FUSED_PARTS.items():
            for converter in converters:
                merged = any(target.endswith(f".{leaf}") for target in converter.target_patterns)
                if part in parts and merged and len(converter.source_patterns) == len(parts):
                    pattern = converter.source_patterns[parts.index(part)].replace("*", number)
                    names.insert(0, f"{parent}.{pattern[pattern.index('experts.') :]}")
    for renaming in renamings:
        for before, after in zip(renaming.source_patterns, renaming.target_patterns, strict=False):
            yield from (name.replace(after, before) for name in names if after in name)
    yield from names


def _expert_name(stored: str, fused: str, pattern: str, converters: list[WeightConverter]) -> str:
    """`...experts.3.up_proj.weight` for the tensor `stored` that transformers would merge into the parameter `fused`."""
    experts, _, leaf = fused.rpartition(".")
    sources = next(c.source_patterns for c in converters if pattern in c.source_patterns)
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), stored)
    parts = FUSED_PARTS.get(leaf, ())
    if number is None or len(parts) != len(sources):
        return fused
    return f"{experts}.{number.group(1)}.{parts[sources.index(pattern)]}.weight"

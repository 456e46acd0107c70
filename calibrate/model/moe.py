"""Mixtures of experts: fused experts are split into linear layers.

transformers stores all experts of a layer in two three-dimensional parameters. These have no inputs to observe and cannot be
replaced by packed weights. Here each expert becomes three linear layers; the layer around the experts calls them as before.
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
    """The linear layers of one expert, a gated feed-forward network; `SplitExperts` computes with them."""

    def __init__(self, hidden: int, inner: int, like: Tensor) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "dtype": like.dtype, "device": like.device}
        self.gate_proj = nn.Linear(hidden, inner, **options)
        self.up_proj = nn.Linear(hidden, inner, **options)
        self.down_proj = nn.Linear(inner, hidden, **options)


class SplitExperts(nn.ModuleList):
    """Replaces a fused module of experts: one `GatedMLP` per expert, with the same call."""

    def __init__(self, fused: Any) -> None:
        count, hidden, inner = fused.down_proj.shape
        super().__init__(GatedMLP(hidden, inner, fused.down_proj) for _ in range(count))
        self._fused = (fused,)  # in a tuple, so that it is not registered as a submodule

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the experts' outputs `[tokens, hidden]`.

        `hidden_states` `[tokens, hidden]`; `top_k_index` int64 and `top_k_weights`, both `[tokens, k]`, are the chosen experts
        and their weights.
        """
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            assert isinstance(expert, GatedMLP)
            token, choice = torch.where(top_k_index == index)
            if not len(token):
                continue
            inputs = hidden_states[token]
            inner = self._fused[0]._apply_gate(torch.cat([expert.gate_proj(inputs), expert.up_proj(inputs)], dim=-1))
            output = expert.down_proj(inner) * top_k_weights[token, choice, None]
            total.index_add_(0, token, output.to(total.dtype))
        return total


def split_fused_experts(model: nn.Module) -> None:
    """Replace every fused module of experts in `model` by `SplitExperts`. The parameters must be on the meta device.

    Modules with interleaved, transposed or biased layouts are not changed.
    """
    for name, module in list(model.named_modules()):
        if is_fused(module):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SplitExperts(module))


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds gated experts as parameters `[experts, 2 inner, hidden]` and `[experts, hidden, inner]`."""
    plain = not any(getattr(module, flag, True) for flag in ("has_bias", "is_transposed", "has_post_expert_norm"))
    gated = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    return bool(plain and gated and set(dict(module.named_parameters())) == FUSED_PARTS.keys())


def routers(block: nn.Module) -> set[nn.Module]:
    """The routers of a block, and the gates that weight a shared expert: small and sensitive, so they are not compressed."""
    found: set[nn.Module] = set()
    for module in block.modules():
        experts = next((child for child in module.children() if isinstance(child, SplitExperts)), None)
        if experts is not None:
            weights = {child: getattr(child, "weight", None) for child in module.children()}
            found |= {c for c, w in weights.items() if isinstance(w, Tensor) and len(w) in (1, len(experts))}
    return found


def stored_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The checkpoint's name of each of the model's tensors, if the two differ, by transformers' own conversion tables."""
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
    """The name of each of the model's `modules` in the original checkpoint format, such as
    `...block_sparse_moe.experts.0.w1`, which other runtimes read.

    Only modules in mixtures of experts whose names differ are included. The inverse of `model_names`.
    """
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
            matching = (c for c in candidates if _stored_names([c], renamings, converters).get(weight) == c)
            found[module] = next(matching, weight).removesuffix(".weight")
    return {module: stored for module, stored in found.items() if stored != module}


def renamed(name: str, modules: Mapping[str, str]) -> str:
    """The tensor `name` with its module's name replaced by the one in `modules`, if there is one."""
    module, _, part = name.rpartition(".")
    return f"{modules[module]}.{part}" if module in modules else name


def model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The model's name of each stored tensor of a mixture of experts, packed or not, if the two names differ."""
    renamings, converters = _conversions(model)
    modules = {name: name.rpartition(".")[0] for name in stored}
    weights = {f"{module}.weight" for module in modules.values()}
    own = {stored: name for name, stored in _stored_names(weights, renamings, converters).items()}
    return {
        name: own[f"{module}.weight"].removesuffix("weight") + name.rpartition(".")[2]
        for name, module in modules.items()
        if own.get(f"{module}.weight", "").endswith(".weight")
    }


def _candidates(weight: str, renamings: list[WeightRenaming], converters: list[WeightConverter]) -> Iterator[str]:
    """Possible names of the model's `weight` before transformers renamed and merged it, the most likely first."""
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
    """The name, such as `...experts.3.up_proj.weight`, of the tensor `stored`, which transformers would merge into `fused`."""
    experts, _, leaf = fused.rpartition(".")
    sources = next(c.source_patterns for c in converters if pattern in c.source_patterns)
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), stored)
    parts = FUSED_PARTS.get(leaf, ())
    if number is None or len(parts) != len(sources):
        return fused
    return f"{experts}.{number.group(1)}.{parts[sources.index(pattern)]}.weight"

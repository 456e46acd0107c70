"""What distillation compares inside two models: block outputs, and attention scores before the softmax."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ...calibrate.model.architecture import find_blocks
from ...errors import UsageError

SCORES = "lmpress_scores"  # the name under which transformers finds the attention that records


@contextmanager
def block_outputs(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """While the context is open, a forward pass fills the list with the outputs of the blocks `layers`, in their order."""
    blocks = find_blocks(model)[1]
    found: list[Tensor] = []

    def record(module: nn.Module, args: object, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [blocks[layer].register_forward_hook(record) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def attention_scores(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """While the context is open, a forward pass fills the list with every layer's scores `[rows, heads, length, length]`.

    They are recorded after scaling and before mask and softmax (XTC compares them after an additive mask, which cancels in
    a difference). Raises `UsageError` for models whose attention cannot be replaced.
    """
    AttentionInterface.register(SCORES, _recording_attention)
    AttentionMaskInterface.register(SCORES, eager_mask)
    found: list[Tensor] = []
    before = model.config._attn_implementation or "eager"
    modules = [module for module in model.modules() if hasattr(module, "num_key_value_groups")]
    if not modules:
        raise UsageError(
            f"the attention scores of {type(model).__name__} cannot be recorded", "leave out --set attention"
        )
    model.set_attn_implementation(SCORES)
    for module in modules:
        vars(module)["recorded_scores"] = found
    try:
        yield found
    finally:
        model.set_attn_implementation(before)
        for module in modules:
            del vars(module)["recorded_scores"]


def _recording_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention of `[rows, heads, length, width]` that appends its scores to the module's list."""
    if others.get("s_aux") is not None:
        raise UsageError("attention with sinks cannot be recorded", "leave out --set attention")
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    module.recorded_scores.append(scores)
    weights = softmax(scores if attention_mask is None else scores + attention_mask, -1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights

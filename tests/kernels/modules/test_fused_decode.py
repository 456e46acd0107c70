"""Fused single-token decoding: the same tokens as with the model's code, which still runs for blocks that differ."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.kernels.cache.cache import serve_cache
from lmpress.kernels.cpu.library import instruction_sets
from lmpress.kernels.modules.fused_decode import FAMILIES, blocks_of, fuse_decode_layers
from lmpress.kernels.modules.linear import Serving, serve
from lmpress.kernels.modules.replace import replace_linear
from lmpress.recipes.scheme import CacheScheme, QuantArgs

FUSED = {"fused": 2}
SHAPE = {"num_key_value_heads": 2, "max_position_embeddings": 128}
Make = Callable[..., PreTrainedModel]


def packed(model: PreTrainedModel, serving: Serving | None = None) -> PreTrainedModel:
    """Every layer of the blocks in 4 bits, symmetric or not in turn: not all that an input meets is alike."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for index, name in enumerate(layers):
        args = QuantArgs(4, index % 5 != 0, "group", 16)
        replace_linear(model, name, round_to_nearest(model.get_submodule(name).weight.detach(), args), serving)
    fuse_decode_layers(model)
    return model


def alone(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose layers run the model's code."""
    other = copy.deepcopy(model)
    for module in other.modules():
        module.__dict__.pop("forward", None)
    return other


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: int = 40) -> Tensor:
    """Of every token of a text, which is read one by one after a start of three."""
    ids = torch.randint(3, 31, (1, tokens), generator=torch.Generator().manual_seed(1))
    out = model(ids[:, :3], use_cache=True)
    found = [out.logits]
    for at in range(3, tokens):
        out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= bound * b.abs().max())


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("instructions", ["avx512-vnni", "avx2", "neon-dotprod", "portable"])
def test_equals_the_model_s_code(make_model: Make, family: str, instructions: str) -> None:
    if instructions not in instruction_sets():
        pytest.skip(f"this machine has no {instructions}")
    changes = {"head_dim": 12} if family in ("llama", "mistral", "qwen3") else {}
    model = packed(make_model(family, **SHAPE, **changes), Serving(kernel=f"c-{instructions}"))
    expected = logits(alone(model))
    assert not close(expected, expected.roll(1, 1), 0.1)  # what came before matters
    assert close(logits(model), expected)
    without_positions = family == "smollm3"  # its second layer
    assert blocks_of(model) == ({"fused": 1, "refused": 1} if without_positions else FUSED)


def test_a_long_text_has_the_same_tokens(make_model: Make) -> None:
    model = packed(make_model("llama", **SHAPE))
    prompt = torch.tensor([[3, 5, 7]])
    answers = [each.generate(prompt, max_new_tokens=64, min_new_tokens=64) for each in (model, alone(model))]
    assert torch.equal(*answers)
    assert blocks_of(model) == FUSED


def test_int8_inputs_are_rounded_alike(make_model: Make) -> None:
    model = packed(make_model("qwen2", **SHAPE), Serving(exact=False))
    assert close(logits(model), logits(alone(model)), 1e-2)
    assert blocks_of(model) == FUSED


def other_gates(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


def other_norms(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.post_attention_layernorm.forward = lambda x: x * 0.5


@pytest.mark.parametrize("change", [other_gates, other_norms])
def test_blocks_that_compute_something_else_are_not_fused(
    make_model: Make, change: Callable[[PreTrainedModel], None]
) -> None:
    model = packed(make_model("llama", **SHAPE))
    change(model)
    own = copy.deepcopy(model)
    for layer in own.model.layers:
        del layer.__dict__["forward"]
    assert torch.equal(logits(model), logits(own))
    assert blocks_of(model) == {"refused": 2}


def test_other_families_and_layers_that_are_not_packed_are_left_alone(make_model: Make) -> None:
    assert blocks_of(packed(make_model("gemma2"))) == {}
    dense = make_model("llama")
    fuse_decode_layers(dense)
    assert blocks_of(dense) == {}


def test_a_replaced_part_of_a_block_is_used(make_model: Make) -> None:
    model = packed(make_model("llama", **SHAPE))
    logits(model)
    old = model.model.layers[0].mlp.up_proj
    tensor = round_to_nearest(torch.randn(old.out_features, old.in_features), QuantArgs(4, True, "group", 16))
    replace_linear(model, "model.layers.0.mlp.up_proj", tensor)
    assert close(logits(model), logits(alone(model)))
    model.model.layers[0].mlp.up_proj = nn.Linear(old.in_features, old.out_features, bias=False)
    assert close(logits(model), logits(alone(model)))


def test_hooks_within_see_every_token(make_model: Make) -> None:
    model = packed(make_model("llama", **SHAPE))
    logits(model)
    seen = []
    hook = model.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    logits(model, 10)
    hook.remove()
    logits(model, 10)
    assert len(seen) == 8
    model.set_attn_implementation("eager")
    assert len(model(torch.tensor([[3]]), output_attentions=True).attentions) == 2


def test_casts_and_copies(make_model: Make) -> None:
    model = packed(make_model("llama", **SHAPE))
    expected = logits(model)
    assert close(logits(copy.deepcopy(model)), expected)
    assert logits(model.to(torch.float64)).dtype == torch.float64
    assert close(logits(model.to(torch.float32)), expected)
    serve(model, Serving(exact=False))
    assert not torch.equal(logits(model), expected)
    serve(model, Serving())
    assert close(logits(model), expected)


def test_a_sliding_window(make_model: Make) -> None:
    model = packed(make_model("mistral", sliding_window=8, **SHAPE))
    assert close(logits(model), logits(alone(model)))
    full = alone(model)
    full.config.sliding_window = None
    assert not close(logits(full), logits(model), 1e-3)
    assert blocks_of(model) == FUSED


@torch.inference_mode()
def test_batches_and_masks_run_the_model_s_code(make_model: Make) -> None:
    model = packed(make_model("llama", **SHAPE))
    logits(model)
    other = alone(model)
    ids = torch.tensor([[0, 3, 5, 7], [4, 6, 8, 3]])
    mask = (ids != 0).long()
    answers = [each.generate(ids, attention_mask=mask, max_new_tokens=9, min_new_tokens=9) for each in (model, other)]
    assert torch.equal(*answers)
    answers = [each.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=9) for each in (model, other)]
    assert torch.equal(*answers)


def test_a_packed_cache_is_read_as_it_is(make_model: Make) -> None:
    model = packed(make_model("llama", **SHAPE))
    serve_cache(model, CacheScheme.of(8))
    assert close(logits(model), logits(alone(model)))
    assert blocks_of(model) == FUSED


def test_extreme_numbers(make_model: Make) -> None:
    model = packed(make_model("llama", **SHAPE))
    logits(model)
    layer, other = model.model.layers[0], alone(model).model.layers[0]
    angles = (torch.ones(1, 1, 8), torch.zeros(1, 1, 8))

    @torch.inference_mode()
    def answer(block: Any, x: Tensor) -> Tensor:
        return block(x, position_embeddings=angles, past_key_values=DynamicCache())

    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for each in (layer, other):
            each.post_attention_layernorm.weight.mul_(1e3)  # gates in the hundreds, of both signs
    assert close(answer(layer, x), answer(other, x))
    for scale in (1e-30, 1e15):
        assert close(answer(layer, x * scale), answer(other, x * scale))
    x[0, 0, 3] = torch.nan
    assert answer(layer, x).isnan().all()


def test_two_threads_agree_with_one(make_model: Make) -> None:
    model = packed(make_model("llama", hidden_size=512, intermediate_size=1024, **SHAPE))
    one = logits(model, 20)
    torch.set_num_threads(2)
    try:
        assert close(logits(model, 20), one)
    finally:
        torch.set_num_threads(1)

"""Folds preserve the function in every architecture of transformers that has one; tests use tiny random models."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmpress.calibrate.channel_graph.links import ChannelLink, find_channel_links
from lmpress.calibrate.model.architecture import find_blocks
from lmpress.compress.methods.transform.rescale import TOLERANCE, Rescale, fold_or_revert

# Sizes under all the names that configs have for them; what a config does not know it only carries along.
SHAPE = {
    "vocab_size": 31,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "decoder_ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# Beside those of conftest.py, which are tested in more ways.
NAMES = """
    afmoe apertus arcee aria_text bart bert biogpt bitnet blenderbot codegen cohere cohere2 cwm diffllama doge ernie4_5
    ernie4_5_moe exaone4 exaone_moe flex_olmo gemma glm glm4 glm4_moe gpt_bigcode gpt_neox_japanese gpt_oss gptj granite
    granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe jais2 jamba jetmoe laguna lfm2 llama4_text minimax
    minimax_m2 ministral ministral3 mpt nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phimoe qwen2_moe qwen3_moe
    recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm
"""


def tiny_model(kind: str) -> PreTrainedModel:
    """A random float32 model with random norms and biases. Skipped if the installed transformers does not have it."""
    try:
        config = AutoConfig.for_model(kind, **SHAPE)
    except ValueError:
        pytest.skip(f"the installed transformers has no {kind}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, float(name.endswith("weight") and "gemma" not in kind), 0.2)
    return model.eval()


def random_factors(link: ChannelLink) -> Rescale:
    """Factors over two decades for the channels with consumers."""
    scale = torch.ones(link.size)
    used = link.channels[link.channels >= 0].unique()
    scale[used] = 10 ** (2 * torch.rand(len(used), generator=torch.Generator().manual_seed(0)) - 1)
    return Rescale(link, scale)


@pytest.mark.filterwarnings("default")  # of the architectures themselves: kernels that fall back to plain PyTorch
@pytest.mark.parametrize("kind", NAMES.split())
@torch.no_grad()
def test_all_folds_together_preserve_the_logits(kind: str, record, random_ids) -> None:
    model = tiny_model(kind)
    expected = model(random_ids, use_cache=False).logits
    found = 0
    for index in range(len(find_blocks(model)[1])):
        block, call, hidden = record(model, index)
        for link in find_channel_links(block, call, hidden):
            assert fold_or_revert(block, random_factors(link), call, hidden) < TOLERANCE
            found += 1
    assert found, f"no fold is found in {kind}"
    logits = model(random_ids, use_cache=False).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()

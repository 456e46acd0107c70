"""Channel links of each architecture, against the known ones."""

import pytest
import torch
from torch import nn

from lmpress.calibrate.channel_graph.links import find_channel_links, query_key_linears

GLU = {"post_attention_layernorm": "gate_proj up_proj", "up_proj": "down_proj"}
LLAMA = {"input_layernorm": "q_proj k_proj v_proj", "v_proj": "o_proj", **GLU}
GEMMA = {
    "input_layernorm": "q_proj k_proj v_proj",
    "v_proj": "o_proj",
    "pre_feedforward_layernorm": "gate_proj up_proj",
    "up_proj": "down_proj",
}
FUSED = {"input_layernorm": "query_key_value", "query_key_value": "dense", "post_attention_layernorm": "dense_h_to_4h"}
LINKS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "smollm3": LLAMA,
    "seed_oss": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": {
        "input_layernorm": "qkv_proj",
        "qkv_proj": "o_proj",
        "post_attention_layernorm": "gate_up_proj",
        "gate_up_proj": "down_proj",
    },
    "phi": {"input_layernorm": "q_proj k_proj v_proj fc1", "v_proj": "dense"},  # attention and MLP in parallel
    "gpt2": {"ln_1": "c_attn", "c_attn": "c_proj", "ln_2": "c_fc"},
    "opt": {
        "self_attn_layer_norm": "q_proj k_proj v_proj",
        "v_proj": "out_proj",
        "final_layer_norm": "fc1",
        "fc1": "fc2",  # ReLU carries positive factors through
    },
    "gpt_neox": FUSED,
    "bloom": FUSED,
    "falcon": {"input_layernorm": "query_key_value dense_h_to_4h", "query_key_value": "dense"},
    "mixtral": {
        "input_layernorm": "q_proj k_proj v_proj",
        "v_proj": "o_proj",
        "post_attention_layernorm": "gate experts",  # the router reads the norm too
    },
}
QUERY_KEY = {
    "phi3": "qkv_proj",
    "gpt2": "c_attn",
    "gpt_neox": "query_key_value",
    "bloom": "query_key_value",
    "falcon": "query_key_value",
}


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def test_exactly_the_known_links_are_found(architecture, record):
    name, model = architecture
    block, call, hidden = record(model, 1)
    found = {
        leaf(f.producer): " ".join(leaf(c.module) for c in f.consumers) for f in find_channel_links(block, call, hidden)
    }
    assert found == LINKS[name]


def test_norms_that_add_one_to_their_weight_are_recognised(architecture, record):
    name, model = architecture
    kinds = {f.kind for f in find_channel_links(*record(model, 0))} - {"linear"}
    assert kinds == ({"offset-norm"} if name.startswith("gemma") else {"norm"})


def test_queries_and_keys_are_found(architecture, record):
    name, model = architecture
    block, call, hidden = record(model, 1)
    found = query_key_linears(block, call, hidden, find_channel_links(block, call, hidden))
    assert {leaf(n) for n in found} == set(QUERY_KEY.get(name, "q_proj k_proj").split())


def test_grouped_queries_map_a_value_row_to_every_query_head(make_model, record):
    links = find_channel_links(*record(make_model("llama"), 0))
    values = next(f for f in links if leaf(f.producer) == "v_proj")
    heads = torch.arange(16).view(2, 8)  # two value heads of eight rows, each read by two query heads
    assert values.size == 16
    assert values.channels.tolist() == torch.cat([heads[0], heads[0], heads[1], heads[1]]).tolist()


def test_value_rows_of_a_matrix_fused_per_head_are_found(make_model, record):
    links = find_channel_links(*record(make_model("gpt_neox"), 0))
    fused = next(f for f in links if f.kind == "linear")
    rows = torch.arange(96).view(4, 3, 8)[:, 2].flatten()  # heads of (query, key, value)
    assert fused.channels.tolist() == rows.tolist()


def test_the_up_half_of_a_fused_gate_is_found(make_model, record):
    links = find_channel_links(*record(make_model("phi3"), 0))
    fused = next(f for f in links if leaf(f.producer) == "gate_up_proj")
    assert fused.channels.tolist() == list(range(48, 96))


def test_another_consumer_prevents_the_link(make_model, record):
    block, call, hidden = record(make_model("llama"), 0)

    class WithBypass(nn.Module):
        """An MLP whose input is also added to its output, bypassing its linears."""

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x) + x

    block.mlp = WithBypass(block.mlp)
    producers = {leaf(f.producer) for f in find_channel_links(block, call, hidden)}
    assert producers == {"input_layernorm", "v_proj", "up_proj"}


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_a_channel_that_is_always_zero_is_marked_unknown(make_model, record, activation):
    block, call, hidden = record(make_model("llama"), 0)
    block.mlp.act_fn = nn.SiLU() if activation == "silu" else nn.ReLU()
    with torch.no_grad():
        block.mlp.up_proj.weight[5] = 0
    link = next(f for f in find_channel_links(block, call, hidden) if leaf(f.producer) == "up_proj")
    assert link.channels.tolist() == [-1 if i == 5 else i for i in range(48)]


def test_the_block_is_left_as_it_was(make_model, record):
    block, call, hidden = record(make_model("mixtral"), 0)
    before = {name: p.clone() for name, p in block.state_dict().items()}
    find_channel_links(block, call, hidden)
    assert all(torch.equal(p, before[name]) for name, p in block.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())

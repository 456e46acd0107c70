"""Folding factors into a producer and its consumers: the function is preserved, also in 16 bits, or the fold reverted."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lmpress.calibrate.channel_graph.links import Consumer, find_channel_links
from lmpress.calibrate.model.architecture import find_blocks
from lmpress.compress.methods.transform.rescale import (
    TOLERANCE,
    Rescale,
    expand_channels,
    fold,
    fold_or_revert,
    reduce_channels,
)


def random_rescale(link, seed=0):
    """Factors over two decades for the channels with consumers."""
    scale = torch.ones(link.size)
    used = link.channels[link.channels >= 0].unique()
    scale[used] = 10 ** (2 * torch.rand(len(used), generator=torch.Generator().manual_seed(seed)) - 1)
    return Rescale(link, scale)


@torch.no_grad()
def test_all_folds_together_preserve_the_logits(architecture, record, random_ids):
    _, model = architecture
    expected = model(random_ids, use_cache=False).logits
    for index in range(len(find_blocks(model)[1])):
        block, call, hidden = record(model, index)
        for link in find_channel_links(block, call, hidden):
            assert fold_or_revert(block, random_rescale(link), call, hidden) < TOLERANCE
    logits = model(random_ids, use_cache=False).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_consumers_get_inputs_divided_by_the_factor(make_model, record):
    block, call, hidden = record(make_model("llama"), 0)
    link = find_channel_links(block, call, hidden)[1]  # values to output projection, grouped queries
    seen = []
    handle = block.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    call.replay(block, hidden)
    columns = fold(block, random_rescale(link)).float()
    call.replay(block, hidden)
    handle.remove()
    torch.testing.assert_close(seen[1], seen[0] / columns, rtol=1e-4, atol=1e-5)


def test_a_wrong_fold_is_reverted_bit_for_bit(make_model, record):
    block, call, hidden = record(make_model("llama"), 0)
    right = find_channel_links(block, call, hidden)[0]
    wrong = replace(right, consumers=right.consumers[:2])  # forgets the values
    before = {name: p.clone() for name, p in block.state_dict().items()}
    assert fold_or_revert(block, random_rescale(wrong), call, hidden) > TOLERANCE
    assert all(torch.equal(p, before[name]) for name, p in block.state_dict().items())


def test_a_factor_that_overflows_is_reverted(make_model, record):
    block, call, hidden = record(make_model("llama"), 0)
    link = find_channel_links(block, call, hidden)[0]
    before = block.input_layernorm.weight.clone()
    assert not fold_or_revert(block, Rescale(link, torch.full((link.size,), 1e-45)), call, hidden) <= TOLERANCE
    assert torch.equal(block.input_layernorm.weight, before)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_a_norm_stored_in_16_bits_causes_no_error(make_model, record, name):
    block, call, hidden = record(make_model(name), 0)
    link = find_channel_links(block, call, hidden)[0]
    weight = block.get_submodule(link.producer).weight
    with torch.no_grad():
        weight.copy_(weight.to(torch.bfloat16))
    assert fold_or_revert(block, random_rescale(link), call, hidden, stored=torch.bfloat16) < 1e-5
    assert torch.equal(weight, weight.to(torch.bfloat16).float())


def test_a_fused_matrix_is_scaled_in_its_value_rows_only(make_model, record):
    block, call, hidden = record(make_model("gpt_neox"), 0)
    link = next(f for f in find_channel_links(block, call, hidden) if f.kind == "linear")
    fused = block.attention.query_key_value
    before, bias = fused.weight.clone(), fused.bias.clone()
    fold(block, Rescale(link, random_rescale(link).scale))
    changed = (fused.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == link.channels.tolist()
    assert (fused.bias != bias).nonzero().flatten().tolist() == link.channels.tolist()


def test_channels_map_back_and_forth(make_model, record):
    link = find_channel_links(*record(make_model("llama"), 0))[1]
    values = torch.arange(32.0)
    heads = values.view(2, 2, 8)  # two query heads per value head
    assert reduce_channels(values, link, "mean").tolist() == heads.mean(1).flatten().tolist()
    assert reduce_channels(values, link, "amax").tolist() == heads.amax(1).flatten().tolist()
    assert expand_channels(torch.arange(16.0), link.channels).tolist() == link.channels.tolist()
    unknown = replace(link, channels=torch.tensor([-1, 3]), consumers=(Consumer("x", "weight", 1),), size=4)
    assert expand_channels(torch.tensor([5.0, 6, 7, 8]), unknown.channels).tolist() == [1, 8]
    assert reduce_channels(torch.tensor([9.0, 2]), unknown, "mean").tolist() == [0, 0, 0, 2]


def test_a_plain_linear_pair_needs_no_transformer():
    block = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

    class Plain:
        def replay(self, block, hidden):
            return block(hidden)

    hidden = torch.randn(16, 3, 6, generator=torch.Generator().manual_seed(0))
    (link,) = find_channel_links(block, Plain(), hidden)
    assert (link.producer, link.consumers[0].module) == ("0", "2")
    assert fold_or_revert(block, random_rescale(link), Plain(), hidden) < TOLERANCE

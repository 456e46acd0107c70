"""AWQ: the search returns the minimum of its losses, each step improves a block, no shape is refused."""

import copy

import pytest
import torch
from torch import nn

from lmpress.calibrate.channel_graph.links import find_channel_links
from lmpress.calibrate.model.architecture import set_weight, weight_of
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.methods.transform.awq import AWQ, apply, clip_limits, consumer_linears, factors, search_scales
from lmpress.compress.methods.transform.recording import module_to_inspect, record
from lmpress.errors import UsageError
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.scheme import QuantArgs, Scheme

W3 = Scheme(QuantArgs(bits=3, symmetric=False, group_size=16))


def round_all(block):
    for linear in block.linears:
        module = block.module.get_submodule(linear.name.removeprefix("b."))
        set_weight(module, round_to_nearest(weight_of(module), linear.args).dequantize())


def rounded_error(block, output, transform=None):
    """Mean squared error of the block's output after an optional transform and rounding to nearest."""
    expected = output(block)
    if transform is not None:
        apply(transform, block)
    round_all(block)
    return float((output(block) - expected).square().mean())


@torch.no_grad()
def test_scaling_and_clipping_each_lower_the_error(make_model, prepare, output):
    def error(transform):
        return rounded_error(prepare(make_model("llama"), W3, outliers=(3, 17)), output, transform)

    plain, scaled, clipped = error(None), error(AWQ(clip=False)), error(AWQ())
    assert scaled < 0.8 * plain
    assert clipped < scaled


@torch.no_grad()
@pytest.mark.parametrize("weight_term", [False, True])
def test_the_search_starts_with_rounding_and_takes_its_minimum(make_model, prepare, weight_term):
    block = prepare(make_model("llama"), W3, outliers=(3,))
    link = find_channel_links(block.module, *block.context.trial)[0]
    recording = record(block, module_to_inspect(block.module, link), "self_attn.q_proj", 10_000)
    before = copy.deepcopy(block.module.state_dict())
    choices = search_scales(recording, block.module, consumer_linears(block, link), link, AWQ(weight_term=weight_term))
    assert all(torch.equal(p, before[n]) for n, p in block.module.state_dict().items())
    assert recording.loss() == 0
    assert {c.ratio for c in choices} == {i / 20 for i in range(21)}
    for name in ("q_proj", "k_proj", "v_proj"):
        module = block.module.self_attn.get_submodule(name)
        set_weight(module, round_to_nearest(module.weight, W3.weights.for_width(32)).dequantize())
    assert choices[0].ratio == choices[0].weight_power == 0
    assert choices[0].loss == pytest.approx(recording.loss(), rel=1e-6)
    block.module.load_state_dict(before)
    apply(AWQ(clip=False, weight_term=weight_term), block)
    figures = block.local()["self_attn.q_proj"].figures
    assert figures["awq_loss"] == min(c.loss for c in choices)
    assert figures["awq_rtn_loss"] == choices[0].loss


def test_factors_follow_the_formula():
    x, w = torch.tensor([0.1, 2.0, 8.0, 0.0]), torch.tensor([0.5, 0.25, 1.0, 0.3])
    for ratio, power in [(0.0, 0.0), (0.5, 0.0), (0.25, 0.75), (1.0, 0.0)]:
        raw = [a**ratio / b**power for a, b in zip(x[:3].tolist(), w[:3].tolist(), strict=True)]
        expected = [r / (max(raw) * min(raw)) ** 0.5 for r in raw]
        torch.testing.assert_close(factors(x, w, ratio, power), torch.tensor([*expected, 1.0]))
    assert factors(x * 0, w, 0.5, 0.5).tolist() == [1, 1, 1, 1]


@torch.no_grad()
def test_scales_alone_preserve_the_block(architecture, prepare, output):
    _, model = architecture
    block = prepare(model, W3, index=1, outliers=(5,))
    expected = output(block)
    before = copy.deepcopy(block.module.state_dict())
    apply(AWQ(clip=False, ratios=4), block)
    assert any(not torch.equal(p, before[n]) for n, p in block.module.state_dict().items())
    assert (output(block) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any("awq_unfolded" in linear.figures for linear in block.linears)


@torch.no_grad()
def test_grouped_queries_share_one_factor_per_value_channel(make_model, prepare):
    block = prepare(make_model("llama"), W3, outliers=(3,))
    rows, columns = block.module.self_attn.v_proj.weight.clone(), block.module.self_attn.o_proj.weight.clone()
    apply(AWQ(clip=False), block)
    ratio = (block.module.self_attn.o_proj.weight / columns).median(0).values.view(2, 2, 8)
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1])
    assert ratio.unique().numel() > 4
    assert (
        block.local()["self_attn.o_proj"].figures["awq_loss"]
        < block.local()["self_attn.o_proj"].figures["awq_rtn_loss"]
    )
    assert rows.shape == block.module.self_attn.v_proj.weight.shape


def brute_force_limits(weight, x, args, size):
    """The published search on explicit inputs, one row and group at a time, in float64."""
    limits = torch.empty(weight.shape[0], weight.shape[1] // size)
    for r in range(weight.shape[0]):
        for g in range(limits.shape[1]):
            part, seen = weight[r : r + 1, g * size : (g + 1) * size], x[:, g * size : (g + 1) * size].double()
            best = None
            for i in range(10):
                limit = part.abs().max() * (1 - i / 20)
                clipped = part.clamp(-limit, limit)
                grid = Grid.fit(clipped, args)
                q = grid.dequantize(grid.quantize(clipped)).double()
                error = float((seen @ (q - part.double()).T).square().sum())
                if best is None or error < best * (1 - 1e-9):
                    best, limits[r, g] = error, limit
    return limits


@pytest.mark.parametrize(("symmetric", "formula"), [(True, "gptq"), (False, "gptq"), (False, "awq")])
def test_clip_limits_are_the_best_of_all_steps(symmetric, formula):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(7, 24, generator=generator), torch.randn(5, 24, generator=generator)  # odd, and few tokens
    args = QuantArgs(bits=3, symmetric=symmetric, formula=formula, group_size=8)
    groups = x.view(5, 3, 8).transpose(0, 1)
    found = clip_limits(weight, groups.transpose(1, 2) @ groups, args)
    largest = weight.view(7, 3, 8).abs().amax(-1)
    steps = (1 - found / largest) * 20
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found, brute_force_limits(weight, x, args, 8))
    assert steps.max() >= 1


@torch.no_grad()
def test_queries_and_keys_are_not_clipped(make_model, prepare):
    block = prepare(make_model("qwen2"), W3, outliers=(3,))
    apply(AWQ(), block)
    clipped = {name for name, linear in block.local().items() if "awq_clipped_share" in linear.figures}
    assert clipped == {"self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@torch.no_grad()
def test_a_channel_that_is_always_zero_is_not_scaled(prepare, make_model):
    block = prepare(make_model("llama"), W3)
    block.module.input_layernorm.weight[4] = 0
    apply(AWQ(clip=False), block)
    assert block.module.input_layernorm.weight[4] == 0
    assert all(p.isfinite().all() for p in block.module.parameters())


@torch.no_grad()
def test_one_row_per_scale_and_single_rows_of_output_work(prepare, make_model):
    block = prepare(
        make_model("llama"), Scheme(QuantArgs(bits=3, symmetric=False, strategy="channel", group_size=None))
    )
    apply(AWQ(search_tokens=1), block)
    assert all(p.isfinite().all() for p in block.module.parameters())
    assert clip_limits(torch.randn(1, 4), torch.eye(4)[None], QuantArgs(bits=2, group_size=4)).shape == (1, 1)


def test_the_inspected_module_is_the_smallest_with_all_consumers(make_model, record):
    def names(model):
        block, call, hidden = record(make_model(model), 0)
        return [module_to_inspect(block, link) for link in find_channel_links(block, call, hidden)]

    assert names("llama") == ["self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"]
    assert names("gpt2") == ["attn", "attn.c_proj", "mlp"]
    assert names("opt") == ["self_attn", "self_attn.out_proj", "fc1", "fc2"]
    assert names("falcon") == ["", "self_attention.dense"]


@pytest.mark.parametrize("options", [{"ratios": 0}, {"search_tokens": 0}])
def test_invalid_options_are_refused(options):
    with pytest.raises(UsageError):
        AWQ(**options)


def test_padding_does_not_count():
    from lmpress.compress.methods.transform.recording import Recording

    module = nn.Identity()
    x = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    moved = x.clone()
    moved[1, 1] = 100
    assert Recording(module, [((moved,), {}, mask)], x.flatten(0, 1), [x]).loss() == 0
    moved[0, 0] += 3
    assert Recording(module, [((moved,), {}, mask)], x.flatten(0, 1), [x]).loss() == 3.0

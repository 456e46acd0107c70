"""SmoothQuant: the formula, what it must preserve, and its gain if activations have outlier channels."""

import pytest
import torch

from lmpress.calibrate.channel_graph.links import find_channel_links
from lmpress.calibrate.model.architecture import set_weight, weight_of
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.methods.transform.rescale import Rescale, consumer_weights, fold
from lmpress.compress.methods.transform.smoothquant import SmoothQuant, alpha_losses, apply, factors
from lmpress.compress.methods.transform.smoothquant import _largest as largest
from lmpress.errors import UsageError
from lmpress.kernels.activations import fake_quantize, grid_of
from lmpress.recipes.scheme import LEVELS, inputs_per


def quantize_all(block):
    """Round the weights and the inputs of every linear as at run time."""
    for name, linear in block.local().items():
        module = block.module.get_submodule(name)
        set_weight(module, round_to_nearest(weight_of(module), linear.args).dequantize())
        module.register_forward_pre_hook(lambda module, args, grid=linear.inputs: (fake_quantize(args[0], grid),))


def quantized_error(block, output, transform=None):
    expected = output(block)
    if transform is not None:
        apply(transform, block)
    quantize_all(block)
    return float((output(block) - expected).square().mean())


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
@torch.no_grad()
def test_shared_groups_follow_the_formula(make_model, prepare, alpha):
    block = prepare(make_model("llama"), LEVELS["O1"], outliers=(3, 17))
    attention, norm = block.module.self_attn, block.module.input_layernorm
    seen = []
    handle = attention.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    for call, hidden, _ in block.context.samples():
        call.replay(block.module, hidden)
    handle.remove()
    x = torch.cat(seen).double().abs().max(0).values
    names = ("q_proj", "k_proj", "v_proj")
    before = {name: attention.get_submodule(name).weight.double() for name in names}
    w = torch.cat(list(before.values())).abs().max(0).values
    expected = x**alpha / w ** (1 - alpha)
    gain = norm.weight.double()
    apply(SmoothQuant(alpha=alpha, linears=False), block)
    torch.testing.assert_close(gain / norm.weight.double(), expected, rtol=1e-5, atol=0)
    for name in names:
        torch.testing.assert_close(
            attention.get_submodule(name).weight.double(), before[name] * expected, rtol=1e-5, atol=1e-9
        )


@torch.no_grad()
def test_smoothing_alone_preserves_the_block(architecture, prepare, output):
    _, model = architecture
    block = prepare(model, LEVELS["O1"], index=1, outliers=(5,))
    expected = output(block)
    apply(SmoothQuant(), block)
    assert (output(block) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any("smoothquant_unfolded" in linear.figures for linear in block.linears)


@torch.no_grad()
def test_output_and_down_projections_can_be_excluded(make_model, prepare):
    def smoothed(**options):
        block = prepare(make_model("llama"), LEVELS["O1"])
        apply(SmoothQuant(**options), block)
        return {name for name, linear in block.local().items() if "smoothquant_alpha" in linear.figures}

    attention, mlp = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"mlp.gate_proj", "mlp.up_proj"}
    assert smoothed(linears=False) == attention | mlp
    assert smoothed() == attention | mlp | {"self_attn.o_proj", "mlp.down_proj"}


@torch.no_grad()
def test_experts_and_router_get_the_factor_and_count_in_the_maximum(make_model, prepare, output):
    block = prepare(make_model("mixtral"), LEVELS["O1"], outliers=(3,))
    mlp, norm = block.module.mlp, block.module.post_attention_layernorm
    router, experts, gain, expected = (
        mlp.gate.weight.clone(),
        mlp.experts.gate_up_proj.clone(),
        norm.weight.clone(),
        output(block),
    )
    link = next(
        f for f in find_channel_links(block.module, *block.context.trial) if f.producer == "post_attention_layernorm"
    )
    assert [w.shape for w in consumer_weights(block.module, link)] == [(4, 32), (4 * 96, 32)]
    scale = torch.linspace(0.5, 2, 32)
    fold(block.module, Rescale(link, scale))
    torch.testing.assert_close(mlp.gate.weight, router * scale)
    torch.testing.assert_close(mlp.experts.gate_up_proj, experts * scale)
    torch.testing.assert_close(norm.weight, gain / scale)
    torch.testing.assert_close(output(block), expected, rtol=1e-4, atol=1e-4)


def test_a_channel_that_is_always_zero_keeps_its_norm():
    scale = factors(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0]), 0.5)
    assert scale.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("level", LEVELS)
@torch.no_grad()
def test_smoothing_lowers_the_error_of_outlier_channels(make_model, prepare, output, level):
    def error(transform):
        return quantized_error(prepare(make_model("llama"), LEVELS[level], outliers=(3, 17)), output, transform)

    assert error(SmoothQuant()) < 0.5 * error(None)


@torch.no_grad()
def test_the_search_is_u_shaped_and_never_worse_than_one_half(make_model, prepare):
    block = prepare(make_model("llama"), LEVELS["O2"], outliers=(3, 17))
    link = find_channel_links(block.module, *block.context.trial)[0]
    names = [c.module for c in link.consumers]
    linears = {name: block.local()[name] for name in names}
    x = largest(block, names[0], SmoothQuant())
    w = torch.cat([block.module.get_submodule(n).weight for n in names]).abs().amax(0)
    losses = alpha_losses(block, link, linears, x, w, 10_000)
    best = min(losses, key=losses.get)
    assert 0 < best < 1
    assert losses[best] < min(losses[0.0], losses[1.0]) / 1.5
    apply(SmoothQuant(alpha="search"), block)
    figures = block.local()[names[0]].figures
    assert figures["smoothquant_alpha"] == best
    assert figures["smoothquant_loss"] == losses[best] <= figures["smoothquant_half_loss"] == losses[0.5]


@torch.no_grad()
def test_the_search_includes_the_rounding_of_the_producer(make_model, prepare, output):
    """Rows of one matrix share a scale: dividing some of them by large factors makes the grid of the others coarse."""

    def error(**options):
        block = prepare(make_model("llama"), LEVELS["O1"])
        with torch.no_grad():
            block.module.mlp.up_proj.weight[3] *= 40
            block.module.mlp.down_proj.weight[:, 3] /= 40
        return quantized_error(block, output, SmoothQuant(**options))

    assert error(alpha="search") < error(alpha=0.5, linears=False)


@torch.no_grad()
def test_a_percentile_ignores_single_outlier_tokens(make_model, prepare):
    block = prepare(make_model("llama"), LEVELS["O1"])
    batches = list(block.context.samples())
    batches[0][1][0, 0] *= 0
    batches[0][1][0, 0, 7] = 1e4  # one token that is all one channel
    block.context = type(block.context)(lambda: iter(batches), block.context.trial, {}, 8)
    name = "self_attn.q_proj"
    full, most = largest(block, name, SmoothQuant()), largest(block, name, SmoothQuant(percentile=99))
    assert (most <= full).all() and most[7] < 0.7 * full[7]


def test_activation_grids():
    x = torch.tensor([[1.0, -127.0, 0.4], [0.0, 0.0, 0.0], [2.0, 1.0, -0.5]])
    token, tensor = inputs_per("token", dynamic=True), inputs_per("tensor", dynamic=False)
    per_token = fake_quantize(x, token)
    assert per_token[0].tolist() == [1.0, -127.0, 0.0] and per_token[1].tolist() == [0, 0, 0]
    assert per_token[2, 0] == 2.0
    static = grid_of(torch.tensor(-3.0), torch.tensor(50.8), tensor)
    assert float(static[0]) == pytest.approx(50.8 / 127)
    assert fake_quantize(x, tensor, static)[0, 1] == pytest.approx(-128 * 50.8 / 127)  # saturates
    noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64).unsqueeze(1)
    errors = [(fake_quantize(noise, args) - noise).abs().sum() for args in (token, inputs_per("tensor", dynamic=True))]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"alpha": -0.1}, {"percentile": 0.0}, {"percentile": 101.0}])
def test_invalid_options_are_refused(options):
    with pytest.raises(UsageError):
        SmoothQuant(**options)

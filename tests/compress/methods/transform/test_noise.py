"""Smoothing by the least rounding noise: the formula against real rounding, the descent, and the pass."""

import pytest
import torch
from torch import Tensor

from lmpress.calibrate.channel_graph.links import ChannelLink, Consumer
from lmpress.compress.methods.transform.noise import NoiseModel, minimize_noise
from lmpress.compress.methods.transform.smoothquant import SmoothQuant, apply
from lmpress.kernels.activations import fake_quantize
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.scheme import LEVELS, QuantArgs, Scheme, inputs_per, signed_weights

PER_TOKEN = inputs_per("token", dynamic=True)
LOPSIDED = inputs_per("token", dynamic=True, symmetric=False)


def numbers(tokens: int = 512, width: int = 32, rows: int = 48) -> tuple[Tensor, Tensor]:
    """Inputs and weights whose channels differ in magnitude."""
    generator = torch.Generator().manual_seed(0)
    sizes = 4 * torch.rand(2, width, generator=generator) - 2
    inputs = torch.randn(tokens, width, generator=generator) * sizes[0].exp()
    return inputs, torch.randn(rows, width, generator=generator) * sizes[1].exp()


def error(
    inputs: Tensor, weight: Tensor, input_args: QuantArgs | None, weight_args: QuantArgs, columns: Tensor
) -> float:
    """The sum of squared errors of the product with both factors actually rounded."""
    grid = Grid.fit(weight * columns, weight_args)
    quantized = grid.dequantize(grid.quantize(weight * columns).float())
    smoothed = inputs / columns
    inputs_used = smoothed if input_args is None else fake_quantize(smoothed, input_args)
    return float((inputs_used.double() @ quantized.double().T - inputs.double() @ weight.double().T).square().sum())


@pytest.mark.parametrize(
    ("input_args", "weight_args"),
    [
        (PER_TOKEN, signed_weights("channel")),
        (LOPSIDED, signed_weights("channel")),
        (inputs_per("tensor", dynamic=True), signed_weights("tensor")),
        (None, QuantArgs(8, False, "group", 8)),
        (PER_TOKEN, QuantArgs(8, True, "group", 8)),
    ],
)
def test_the_noise_formula_matches_real_rounding(input_args: QuantArgs | None, weight_args: QuantArgs) -> None:
    inputs, weight = numbers()
    for columns in (torch.ones(32), inputs.abs().amax(0).sqrt()):
        expected = error(inputs, weight, input_args, weight_args, columns)
        found = float(NoiseModel(inputs, weight, input_args, weight_args).noise(columns)) / 12
        assert found == pytest.approx(expected, rel=0.12)


def test_the_descent_ends_far_below_the_power_law() -> None:
    """A few channels are large in a single token, and the power law uses that maximum."""
    inputs, weight = numbers()
    inputs[0, :8] *= 30
    start = (inputs.abs().amax(0) / weight.abs().amax(0)).sqrt()
    link = ChannelLink("norm", "norm", (Consumer("x", "weight", 1),), torch.arange(32), 32)
    model = NoiseModel(inputs, weight, PER_TOKEN, signed_weights("channel"))
    scale, ratio = minimize_noise(model, start, link)
    assert ratio == pytest.approx(float(model.noise(scale) / model.noise(start))) and ratio < 0.9
    real = [error(inputs, weight, PER_TOKEN, signed_weights("channel"), columns) for columns in (start, scale)]
    assert real[1] < 0.95 * real[0]


def test_unknown_and_shared_channels() -> None:
    """Two columns share one producer channel, one column has none and is not scaled."""
    inputs, weight = numbers(width=4)
    link = ChannelLink("v", "linear", (Consumer("o", "weight", 1),), torch.tensor([0, 0, 1, -1]), 3)
    scale, ratio = minimize_noise(NoiseModel(inputs, weight, PER_TOKEN, signed_weights("channel")), torch.ones(3), link)
    assert scale.shape == (3,) and scale[2] == 1 and 0 < ratio <= 1 and scale[:2].isfinite().all()


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
@torch.no_grad()
def test_the_pass_folds_the_factors(make_model, prepare, output, name: str) -> None:
    block = prepare(make_model(name), LEVELS["O1"], outliers=(3, 17))
    expected = output(block)
    apply(SmoothQuant(alpha="noise"), block)
    assert (output(block) - expected).abs().max() <= 1e-4 * expected.abs().max()
    ratios = [linear.figures["smoothquant_noise"] for linear in block.linears if "smoothquant_noise" in linear.figures]
    assert ratios and all(0 < ratio <= 1 for ratio in ratios)


@torch.no_grad()
def test_unquantized_inputs_have_no_noise(make_model, prepare, output) -> None:
    block = prepare(make_model("llama"), Scheme(QuantArgs(4, True, "group", 8)))
    expected = output(block)
    apply(SmoothQuant(alpha="noise"), block)
    assert (output(block) - expected).abs().max() <= 1e-4 * expected.abs().max()

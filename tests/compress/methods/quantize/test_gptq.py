"""GPTQ against an independent float64 column loop, the bookkeeping identity I1, and its documented properties."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lmpress.calibrate.statistics.hessian import Hessian
from lmpress.compress.block import Block, Linear
from lmpress.compress.methods.quantize import gptq
from lmpress.compress.methods.quantize.gptq import GPTQ, column_order, prepare, solve
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.solver.loss import layer_loss
from lmpress.errors import UsageError
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.scheme import QuantArgs

CHANNEL = QuantArgs(bits=4, strategy="channel", group_size=None)
CONFIGS = [
    GPTQ(),
    GPTQ(order="natural"),
    GPTQ(order="group"),
    GPTQ(order="group", groups="dynamic"),
    GPTQ(order="natural", groups="dynamic"),
]


def correlated(tokens: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Inputs with strong correlations and a few outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    spread = torch.rand(width, generator=generator, dtype=torch.float64).mul(3).exp()
    return (torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing * spread).to(dtype)


def weights(rows: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def statistic(inputs: Tensor) -> Hessian:
    hessian = Hessian(inputs.shape[1], inputs.dtype)
    hessian.update(inputs, sequences=1)
    return hessian


def textbook(weight: Tensor, inputs: Tensor, args: QuantArgs, damping: float) -> Tensor:
    """GPTQ in natural order with static groups, written from the formulas: one column at a time, full updates."""
    hessian = 2 * inputs.T @ inputs
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    grid, current, quantized = Grid.fit(weight, args), weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        quantized[:, j] = grid.dequantize(grid.quantize(current))[:, j]
        error = (current[:, j] - quantized[:, j]) / upper[j, j]
        current[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    return quantized


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("width", "group"), [(96, 32), (172, 43), (130, None)])
def test_equals_the_textbook_loop(width: int, group: int | None, symmetric: bool) -> None:
    args = QuantArgs(bits=3, symmetric=symmetric, strategy="group" if group else "channel", group_size=group)
    inputs, weight = correlated(400, width), weights(24, width)
    config = GPTQ(order="natural", block_size=32)
    ours = solve(weight, prepare(statistic(inputs).matrix(), args, config), args, config).tensor.dequantize(
        torch.float64
    )
    expected = textbook(weight, inputs, args, config.damping)
    assert (ours != expected).double().mean() < 0.002  # ties of the symmetric grid may fall either way
    hessian = 2 * inputs.T @ inputs
    assert layer_loss(weight - ours, hessian) == pytest.approx(layer_loss(weight - expected, hessian), rel=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.order}-{c.groups}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("width", "group"), [(172, 43), (256, 32), (70, None)])
def test_bookkeeping_identity(
    config: GPTQ, dtype: torch.dtype, tolerance: float, width: int, group: int | None
) -> None:
    args = QuantArgs(bits=3, strategy="group" if group else "channel", group_size=group)
    weight = weights(40, width, dtype)
    prepared = prepare(statistic(correlated(500, width, dtype)).matrix(), args, config)
    solution = solve(weight, prepared, args, config)
    delta = weight - solution.tensor.dequantize(dtype)
    product = gptq.sweep_columns(weight, prepared, args, config)[2].T @ prepared.factor.upper
    assert (delta[:, prepared.order] - product).norm() <= tolerance * delta.norm()
    damped = prepared.hessian + config.damping * prepared.hessian.diagonal().mean() * torch.eye(width, dtype=dtype)
    assert solution.damped_loss == pytest.approx(layer_loss(delta, damped), rel=tolerance)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.order}-{c.groups}")
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_beats_rounding_on_correlated_inputs(config: GPTQ, bits: int) -> None:
    args = QuantArgs(bits=bits, group_size=32)
    inputs, weight = correlated(600, 128), weights(32, 128)
    prepared = prepare(statistic(inputs).matrix(), args, config)
    solved = solve(weight, prepared, args, config).tensor
    rounded = round_to_nearest(weight, args)
    loss, rtn = (layer_loss(weight - t.dequantize(torch.float64), prepared.hessian) for t in (solved, rounded))
    assert loss < 0.8 * rtn


@pytest.mark.parametrize("order", ["natural", "act"])
def test_block_size_does_not_matter(order: gptq.Order) -> None:
    args, inputs, weight = QuantArgs(group_size=32), correlated(500, 256), weights(16, 256)
    results = []
    for block in (32, 100, 128, 1000):
        config = GPTQ(order=order, block_size=block)
        results.append(solve(weight, prepare(statistic(inputs).matrix(), args, config), args, config).tensor.codes)
    assert all((codes != results[0]).double().mean() < 0.001 for codes in results[1:])


def test_permuting_the_columns_permutes_the_result() -> None:
    inputs, weight = correlated(500, 96), weights(16, 96)
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    direct = solve(weight, prepare(statistic(inputs).matrix(), CHANNEL, GPTQ()), CHANNEL, GPTQ()).tensor
    moved = solve(
        weight[:, shuffle], prepare(statistic(inputs[:, shuffle]).matrix(), CHANNEL, GPTQ()), CHANNEL, GPTQ()
    ).tensor
    assert (direct.codes[:, shuffle] != moved.codes).double().mean() < 0.002


def test_dead_columns_become_zero_and_few_tokens_suffice() -> None:
    inputs = correlated(20, 64)  # fewer tokens than columns
    inputs[:, [3, 40]] = 0
    args = QuantArgs(symmetric=False, group_size=32)
    prepared = prepare(statistic(inputs).matrix(), args, GPTQ())
    assert prepared.dead.nonzero().flatten().tolist() == [3, 40]
    quantized = solve(weights(16, 64), prepared, args, GPTQ()).tensor.dequantize()
    assert quantized.isfinite().all()
    assert (quantized[:, [3, 40]] == 0).all()


@pytest.mark.parametrize("shape", [(1, 64), (8, 1), (1, 1), (5, 7)])
def test_smallest_layers(shape: tuple[int, int]) -> None:
    rows, width = shape
    args = QuantArgs(group_size=32).for_width(width)
    prepared = prepare(statistic(correlated(30, width)).matrix(), args, GPTQ())
    assert solve(weights(rows, width), prepared, args, GPTQ()).tensor.dequantize().shape == shape


def test_all_zero_weights_stay_zero() -> None:
    prepared = prepare(statistic(correlated(100, 64)).matrix(), CHANNEL, GPTQ())
    assert not solve(torch.zeros(4, 64, dtype=torch.float64), prepared, CHANNEL, GPTQ()).tensor.dequantize().any()


def test_column_orders() -> None:
    diagonal = torch.tensor([1.0, 5.0, 2.0, 2.0, 9.0, 0.5])
    assert column_order(diagonal, 2, "natural").tolist() == [0, 1, 2, 3, 4, 5]
    assert column_order(diagonal, 2, "act").tolist() == [4, 1, 2, 3, 0, 5]
    assert column_order(diagonal, 2, "group").tolist() == [4, 5, 1, 0, 2, 3]


def test_apply_records_the_figures_and_is_never_worse_than_rounding() -> None:
    args, inputs, weight = QuantArgs(bits=3, group_size=32), correlated(300, 64).float(), weights(8, 64).float()
    linear = Linear("layer", weight, args, statistic(inputs))
    gptq.apply(GPTQ(), Block("block", nn.Identity(), [linear]))
    assert linear.result is not None
    assert linear.figures["loss"] <= linear.figures["rtn_loss"]
    assert linear.figures["damping"] == 0.01
    hessian = 2 * inputs.double().T @ inputs.double()
    delta = (weight - linear.result.dequantize()).double()
    assert linear.figures["loss"] == pytest.approx(layer_loss(delta, hessian), rel=1e-4)


def test_a_worse_solution_is_replaced_by_rounding() -> None:
    """A solution that is worse than rounding is replaced by it: here all solved codes are wrong."""
    args, inputs, weight = QuantArgs(group_size=32), correlated(300, 64).float(), weights(8, 64).float()
    linear = Linear("layer", weight, args, statistic(inputs))
    rounded = round_to_nearest(weight, args)
    linear.result = replace(rounded, codes=torch.zeros_like(rounded.codes))
    gptq.keep_better(linear, statistic(inputs).matrix())
    assert linear.figures["fallback"] == "rtn"
    assert torch.equal(linear.result.codes, rounded.codes)


def test_scattered_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="groups=dynamic"):
        GPTQ(order="act", groups="dynamic")

"""OBQ: results on the grid, better than rounding, equal to GPTQ if the order is fixed; pruned weights stay zero."""

import pytest
import torch
from torch import Tensor, nn

from lmpress.calibrate.statistics.hessian import Hessian
from lmpress.compress.block import Block, Linear
from lmpress.compress.methods.quantize import obq
from lmpress.compress.methods.quantize.gptq import GPTQ, prepare, solve
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.solver.damped_hessian import damp
from lmpress.compress.solver.loss import layer_loss
from lmpress.recipes.scheme import PruneArgs, QuantArgs, Scheme

ARGS = {
    "channel": QuantArgs(bits=3, strategy="channel", group_size=None),
    "group": QuantArgs(bits=3, symmetric=False, group_size=16),
    "tensor": QuantArgs(bits=4, symmetric=False, strategy="tensor", group_size=None),
}


def problem(rows: int = 12, width: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, width, generator=generator, dtype=torch.float64)
    x[:, 1:] += 0.8 * x[:, :-1]
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), 2 * x.T @ x


@pytest.mark.parametrize("order", ["greedy", "act", "fixed"])
@pytest.mark.parametrize("args", ARGS.values(), ids=ARGS)
def test_better_than_rounding_on_the_same_grid(order: obq.Order, args: QuantArgs) -> None:
    weight, hessian = problem()
    found = obq.quantize(weight, damp(hessian, 0.01), args, order)
    rounded = round_to_nearest(weight, args)
    assert torch.equal(found.scale, rounded.scale)
    losses = [layer_loss(weight - t.dequantize(torch.float64), hessian) for t in (found, rounded)]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize(("order", "same"), [("act", "act"), ("fixed", "natural")])
def test_a_fixed_order_is_gptq(order: obq.Order, same: str) -> None:
    weight, hessian = problem()
    args = ARGS["channel"]
    config = GPTQ(order=same)  # type: ignore[arg-type]
    expected = solve(weight, prepare(hessian, args, config), args, config).tensor
    found = obq.quantize(weight, damp(hessian, 0.01), args, order)
    assert (found.codes != expected.codes).double().mean() < 0.005  # ties of the symmetric grid


@pytest.mark.parametrize("order", ["greedy", "act", "fixed"])
@pytest.mark.parametrize("args", ARGS.values(), ids=ARGS)
def test_joint_with_pruning(order: obq.Order, args: QuantArgs) -> None:
    weight, hessian = problem()
    solved = damp(hessian, 0.01)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    start = weight.masked_fill(pruned, 0)
    found = obq.quantize(start, solved, args, order, pruned).dequantize(torch.float64)
    assert not found[pruned].any()
    plain = round_to_nearest(start, args).dequantize(torch.float64)
    assert layer_loss(start - found, hessian) < 0.9 * layer_loss(start - plain, hessian)


def test_the_pass_prunes_and_quantizes() -> None:
    weight, hessian = problem()
    args = ARGS["group"]
    statistic = Hessian(64, torch.float64)
    statistic._sum, statistic.sequences = hessian / 2, 1
    linear = Linear("layer", weight.float(), args, statistic)
    obq.apply(obq.OBQ(Scheme(args), pruning=PruneArgs(pattern="2:4")), Block("block", nn.Identity(), [linear]))
    assert linear.result is not None
    zeros = (linear.result.dequantize() == 0).view(12, -1, 4).sum(2)
    assert (zeros >= 2).all()
    assert linear.figures["sparsity"] == 0.5
    assert 0 < linear.figures["relative_error"] < 1

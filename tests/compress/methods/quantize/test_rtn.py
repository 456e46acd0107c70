"""Rounding to nearest against a search over all codes in float64."""

import pytest
import torch
from torch import nn

from lmpress.compress.block import Block, Linear
from lmpress.compress.methods.quantize.rtn import RTN, apply, round_to_nearest, rounded
from lmpress.kernels.tensor import CompressedTensor
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.methods import Needs
from lmpress.recipes.scheme import QuantArgs

GRIDS = {
    "symmetric": QuantArgs(3, True, "group", 8),
    "asymmetric": QuantArgs(4, False, "group", 8),
    "row": QuantArgs(2, False, "channel", None),
    "tensor": QuantArgs(8, True, "tensor", None),
    "signed": QuantArgs(4, True, "group", 16, formula="signed"),
}


def weight(rows: int = 6, columns: int = 32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("args", GRIDS.values(), ids=GRIDS)
def test_no_code_is_nearer(args: QuantArgs) -> None:
    found = round_to_nearest(weight(), args)
    assert isinstance(found, CompressedTensor)
    scale = found.scale.double().expand(6, -1).repeat_interleave(32 // found.scale.shape[1], 1)
    zero = torch.full_like(scale, 2 ** (args.bits - 1))
    if found.zero is not None:
        zero = found.zero.double().expand(6, -1).repeat_interleave(32 // found.scale.shape[1], 1)
    points = scale.unsqueeze(-1) * (torch.arange(2**args.bits).double() - zero.unsqueeze(-1))
    nearest = (points - weight().double().unsqueeze(-1)).abs().amin(-1)
    error = (found.dequantize(torch.float64) - weight().double()).abs()
    assert torch.allclose(error, nearest, atol=1e-7)


def test_points_of_the_grid_stay_where_they_are() -> None:
    for args in GRIDS.values():
        grid = Grid.fit(weight(), args)
        codes = torch.randint(0, args.maxq + 1, (6, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
        assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)


def test_a_row_of_zeros_stays_zero() -> None:
    values = weight()
    values[3] = 0
    for args in (GRIDS["symmetric"], GRIDS["asymmetric"]):
        assert not round_to_nearest(values, args).dequantize()[3].any()


def test_the_pass_rounds_every_linear_and_needs_no_text() -> None:
    linears = [Linear(f"block.{n}", weight(rows), GRIDS["asymmetric"]) for n, rows in enumerate((4, 9))]
    apply(RTN(), Block("block", nn.Identity(), linears))
    assert RTN().needs == Needs()
    for linear in linears:
        assert linear.result is not None
        assert torch.equal(linear.result.dequantize(), round_to_nearest(linear.weight, linear.grid_args).dequantize())


def test_what_transforms_are_judged_by_leaves_out_what_other_methods_add() -> None:
    plain = QuantArgs(8, True, "channel", None, formula="signed")
    columns = QuantArgs(8, True, "channel", None, formula="signed", outliers=0.1)
    assert torch.equal(rounded(weight(), columns), round_to_nearest(weight(), plain).dequantize())
    ranked = QuantArgs(3, True, "group", 8, rank=4)
    assert torch.equal(rounded(weight(), ranked), round_to_nearest(weight(), GRIDS["symmetric"]).dequantize())

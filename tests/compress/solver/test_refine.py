"""Descent over scales and codes against brute force, float64 least squares and the reported loss."""

from itertools import product

import pytest
import torch
from torch import Tensor

from lmpress.compress.solver.factor import inverse_factor, solve_upper_, transposed_times_, upper_times_
from lmpress.compress.solver.loss import layer_loss
from lmpress.compress.solver.refine import Descent, refine
from lmpress.kernels.tensor import of_grid
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.scheme import QuantArgs


def problem(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def descend(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, sweeps: int) -> tuple[Tensor, Grid, float]:
    """`refine` towards `weight`, a part of the Hessian's diagonal given as damping."""
    shift = 0.125 * float(hessian.diagonal().min())
    undamped = hessian - shift * torch.eye(len(hessian), dtype=hessian.dtype)
    return refine(hessian @ (weight - grid.dequantize(codes)).T, undamped, shift, codes, grid, sweeps)


def args_for(width: int, group: int | None, symmetric: bool, bits: int = 3) -> QuantArgs:
    strategy = "group" if group else "channel"
    return QuantArgs(bits=bits, symmetric=symmetric, strategy=strategy, group_size=group).for_width(width)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("width", "group"), [(96, 32), (172, 43), (70, None), (200, 4), (5, None), (1, None), (1100, 100), (650, None)]
)
def test_the_loss_falls_by_exactly_what_is_reported(width: int, group: int | None, symmetric: bool) -> None:
    weight, hessian = problem(9, width)
    grid = Grid.fit(weight, args_for(width, group, symmetric))
    codes = grid.quantize(weight)
    before = layer_loss(weight - grid.dequantize(codes), hessian)
    previous = before
    for sweeps in (1, 2, 5):
        settled, moved, fallen = descend(weight, hessian, codes, grid, sweeps)
        after = layer_loss(weight - moved.dequantize(settled), hessian)
        assert after == pytest.approx(before - fallen, rel=1e-9, abs=1e-12)
        assert after <= previous * (1 + 1e-12)
        assert settled.max() <= grid.args.maxq
        assert torch.equal(
            moved.scale, moved.scale.half().double()
        )  # the scales are representable in their stored dtype
        previous = after
    if width > 5:
        assert previous < before


def test_no_single_code_can_be_improved_at_the_end() -> None:
    """Brute force over every code of every weight, all others fixed."""
    weight, hessian = problem(4, 12)
    grid = Grid.fit(weight, args_for(12, 4, symmetric=False, bits=2))
    codes, grid, _ = descend(weight, hessian, grid.quantize(weight), grid, 50)
    reached = layer_loss(weight - grid.dequantize(codes), hessian)
    for row, column, code in product(range(4), range(12), range(4)):
        other = codes.clone()
        other[row, column] = code
        assert layer_loss(weight - grid.dequantize(other), hessian) >= reached - 1e-12


def test_one_column_takes_the_best_code() -> None:
    weight, hessian = torch.tensor([[0.83], [-0.31]], dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)
    args = QuantArgs(bits=3, strategy="tensor", group_size=None)  # the scale of a whole tensor does not move
    grid = Grid(torch.tensor([[0.25]], dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64), args)
    codes, moved, _ = descend(weight, hessian, torch.zeros(2, 1, dtype=torch.uint8), grid, 1)
    best = [min(range(8), key=lambda c: (w - 0.25 * (c - 4)) ** 2) for w in weight.flatten().tolist()]
    assert codes.flatten().tolist() == best
    assert (moved.scale == 0.25).all()


def test_moving_scales_alone_reaches_the_joint_least_squares_optimum() -> None:
    """Group after group, with codes fixed and scales stored exactly, against one lstsq per row over all its scales."""
    weight, hessian = problem(5, 24)
    args = QuantArgs(bits=4, group_size=8, scale_dtype="float32")
    grid = Grid.fit(weight, args)
    codes = grid.quantize(weight)
    descent = Descent.start(hessian @ (weight - grid.dequantize(codes)).T, hessian, 0.0, codes, grid)
    for _ in range(60):
        for first in range(0, 24, 8):
            descent.move_scale(slice(first, first + 8), torch.empty(8, 5, dtype=torch.float64))
            descent.slope = hessian @ (weight - Grid(descent.scale.T, grid.zero, args).dequantize(codes)).T
    root = torch.linalg.cholesky(hessian).T  # 1/2 ||root (w - q)||^2 is the loss
    for row in range(5):
        steps = torch.zeros(24, 3, dtype=torch.float64)
        for group in range(3):
            part = slice(8 * group, 8 * group + 8)
            steps[part, group] = codes[row, part].double() - grid.zero[row, group]
        expected = torch.linalg.lstsq(root @ steps, (root @ weight[row]).unsqueeze(1)).solution.flatten()
        assert torch.allclose(descent.scale[:, row], expected, rtol=1e-4)


def test_dead_and_duplicated_columns_and_zero_weights_are_handled() -> None:
    weight, _ = problem(3, 16)
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs[:, 5] = inputs[:, 4]
    hessian = inputs.T @ inputs + 0.01 * torch.eye(16, dtype=torch.float64)
    weight[1] = 0
    grid = Grid.fit(weight, args_for(16, 8, symmetric=True))
    codes, moved, fallen = descend(weight, hessian, grid.quantize(weight), grid, 10)
    assert moved.dequantize(codes).isfinite().all()
    assert (moved.scale > 0).all()
    assert not moved.dequantize(codes)[1].any()
    assert fallen >= 0


def test_the_slope_after_a_sweep_is_one_triangular_solve() -> None:
    weight, hessian = problem(7, 300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5))
    upper = inverse_factor(hessian, 0.01, order).upper
    errors = torch.randn(300, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(300, dtype=torch.float64)
    expected = damped[order][:, order] @ (errors.T @ upper).T
    assert torch.allclose(
        solve_upper_(upper, errors.clone()), expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max())
    )
    assert torch.allclose(transposed_times_(upper, weight.T.contiguous()), upper.T @ weight.T, rtol=1e-9, atol=1e-12)
    assert torch.allclose(upper_times_(upper, weight.T.contiguous()), upper @ weight.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("bits", "symmetric", "size"), [(4, False, 32), (6, True, 16)], ids=["Q4_K", "Q6_K"])
def test_super_blocks_descend_from_multiple_to_multiple(bits: int, symmetric: bool, size: int) -> None:
    """The reported gain is the fall of the loss, and the result can be stored."""
    weight, hessian = problem(4, 256)
    args = QuantArgs(bits, symmetric, group_size=size, formula="ggml", scale_dtype="super")
    grid = Grid.fit(weight, args)
    codes = grid.quantize(weight)
    after, moved, fallen = descend(weight, hessian, codes, grid, 3)
    tensor = of_grid(after, moved)
    assert torch.allclose(tensor.dequantize(torch.float64), moved.dequantize(after), rtol=0, atol=1e-9)
    losses = [layer_loss(weight - q, hessian) for q in (grid.dequantize(codes), tensor.dequantize(torch.float64))]
    assert losses[0] - losses[1] == pytest.approx(fallen, rel=1e-6) and losses[1] < 0.8 * losses[0]


def test_a_minimum_goes_to_the_best_of_all_multiples() -> None:
    weight, hessian = problem(3, 256)
    grid = Grid.fit(weight, QuantArgs(4, False, group_size=32, formula="ggml", scale_dtype="super"))
    codes = grid.quantize(weight)
    descent = Descent.start(hessian @ (weight - grid.dequantize(codes)).T, hessian, 0.0, codes, grid)
    descent.move_minimum(slice(32, 64), torch.empty(32, 3, dtype=torch.float64))
    assert grid.units is not None and grid.units.minimum is not None

    def loss(row: int, multiple: int) -> float:
        zero = grid.zero.clone()
        zero[row, 1] = multiple * grid.units.minimum[row, 0] / grid.scale[row, 1]
        return layer_loss(
            weight[row : row + 1] - Grid(grid.scale, zero, grid.args).dequantize(codes)[row : row + 1], hessian
        )

    for row in range(3):
        best = min(range(64), key=lambda multiple: loss(row, multiple))
        found = descent.zero[1, row] * grid.scale[row, 1] / grid.units.minimum[row, 0]
        assert float(found) == pytest.approx(best, abs=1e-6)

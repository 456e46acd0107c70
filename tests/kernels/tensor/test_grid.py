"""Every named grid against its formula, written out value by value."""

import pytest
import torch

from lmpress.errors import CompressError, UsageError
from lmpress.kernels.tensor import CompressedTensor
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.scheme import QuantArgs, group_strategy, nearest_divisor


def expected_grid(formula: str, symmetric: bool, bits: int, x: list[float]) -> tuple[float, float]:
    """Scale and zero of one group, from the table of the literature, in plain Python floats."""
    maxq, low, high = 2**bits - 1, min(x), max(x)
    absmax = max(abs(low), abs(high))
    if symmetric:
        scale = {"gptq": 2 * absmax / maxq, "signed": absmax / (2 ** (bits - 1) - 1), "ds": 2 * absmax / 2**bits}
        return scale[formula], 2 ** (bits - 1)
    if formula == "gptq":
        low, high = min(low, 0.0), max(high, 0.0)
    scale = {"ds": (high - low) / 2**bits, "awq": max(high - low, 1e-5) / maxq}.get(formula, (high - low) / maxq)
    zero = {"spqr": -low / scale}.get(formula, round(-low / scale))
    return scale, min(max(zero, 0), maxq) if formula in ("awq", "gptq") else zero


NAMED = [
    ("gptq", True),
    ("gptq", False),
    ("signed", True),
    ("ds", True),
    ("ds", False),
    ("awq", False),
    ("spqr", False),
]


@pytest.mark.parametrize(("formula", "symmetric"), NAMED, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shift", [0.0, 2.0, -2.0], ids=["mixed", "positive", "negative"])
def test_named_grids(formula, symmetric: bool, bits: int, shift: float) -> None:
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) + shift
    args = QuantArgs(bits=bits, symmetric=symmetric, group_size=6, formula=formula, scale_dtype="float32")
    grid = Grid.fit(weight, args)
    for row in range(3):
        for group in range(2):
            scale, zero = expected_grid(formula, symmetric, bits, weight[row, 6 * group : 6 * group + 6].tolist())
            assert float(grid.scale[row, group]) == pytest.approx(scale, rel=1e-6)
            assert float(grid.zero[row, group]) == pytest.approx(zero, rel=1e-6)


@pytest.mark.parametrize(("formula", "symmetric"), NAMED, ids=str)
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_codes_are_the_nearest_points(formula, symmetric: bool, strategy, observer) -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    size = 8 if strategy == "group" else None
    args = QuantArgs(3, symmetric, strategy, size, formula, observer)
    grid = Grid.fit(weight, args)
    best = (grid.dequantize(grid.quantize(weight)) - weight).abs()
    for code in range(args.maxq + 1):
        other = (grid.dequantize(torch.full_like(weight, code, dtype=torch.uint8)) - weight).abs()
        assert (best <= other + 1e-12).all()


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_what_is_stored_is_what_was_evaluated(scale_dtype) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))
    for symmetric in (True, False):
        grid = Grid.fit(weight, QuantArgs(symmetric=symmetric, group_size=32, scale_dtype=scale_dtype))
        codes = grid.quantize(weight)
        assert torch.equal(CompressedTensor.from_grid(codes, grid).dequantize(), grid.dequantize(codes))


def test_zero_weights_stay_zero_and_constant_groups_survive() -> None:
    weight = torch.cat([torch.zeros(2, 8), torch.full((2, 8), 3.0), torch.full((2, 8), -0.25)])
    for symmetric in (True, False):
        grid = Grid.fit(weight, QuantArgs(symmetric=symmetric, group_size=8))
        values = grid.dequantize(grid.quantize(weight))
        assert (values[:2] == 0).all()
        assert (values - weight).abs().max() <= 0.5 * 3.0 / 7  # at most half a step


def test_mse_observer_never_loses_to_minmax_by_its_own_norm() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(6)) ** 3  # heavy tails
    for symmetric in (True, False):
        errors = {}
        for observer in ("minmax", "mse"):
            grid = Grid.fit(weight, QuantArgs(3, symmetric, group_size=32, observer=observer))
            errors[observer] = (grid.dequantize(grid.quantize(weight)) - weight).abs().pow(2.4).sum(1)
        assert (errors["mse"] <= errors["minmax"]).all()
        assert (errors["mse"] < 0.9 * errors["minmax"]).any()


def test_tiny_weights_keep_a_positive_scale_and_huge_ones_are_refused() -> None:
    tiny = Grid.fit(torch.full((1, 8), 1e-12), QuantArgs(group_size=8))
    assert (tiny.scale > 0).all()
    with pytest.raises(CompressError, match="overflows float16"):
        Grid.fit(torch.full((1, 8), 1e7), QuantArgs(group_size=8))


@pytest.mark.parametrize(
    ("width", "asked", "expected"), [(172, 32, 43), (172, 128, 172), (352, 32, 32), (7, 32, 7), (96, 64, 48), (1, 8, 1)]
)
def test_groups_that_do_not_divide(width: int, asked: int, expected: int) -> None:
    assert nearest_divisor(width, asked) == expected
    args = QuantArgs(group_size=asked).for_width(width)
    assert args.columns_per_scale(width) == expected


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(UsageError, match=f"bits {bits} is outside"):
        QuantArgs(bits=bits)


@pytest.mark.parametrize("size", [0, 7, -2, 12])
def test_unusable_group_sizes(size: int) -> None:
    with pytest.raises(UsageError, match=f"group size {size} "):
        group_strategy(size)


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="no symmetric form"):
        QuantArgs(symmetric=True, formula="awq")
    with pytest.raises(UsageError, match="has no groups"):
        QuantArgs(strategy="channel", group_size=32)


def test_a_zero_that_cannot_be_stored_is_refused_rather_than_wrapped() -> None:
    weight = torch.linspace(5.0, 6.0, 8).unsqueeze(0)  # far from zero: the ds grid puts its zero below code 0
    grid = Grid.fit(weight, QuantArgs(symmetric=False, group_size=8, formula="ds"))
    with pytest.raises(CompressError, match="does not fit 4 bits"):
        CompressedTensor.from_grid(grid.quantize(weight), grid)

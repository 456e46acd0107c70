"""Static ranges of inputs: every observer against its definition in float64, and layers without tokens."""

import pytest
import torch
from torch import Tensor

from lmpress.calibrate.observers import Range
from lmpress.errors import UsageError
from lmpress.kernels.activations import fake_quantize, grid_of
from lmpress.recipes.scheme import QuantArgs, Scheme, inputs_per


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(50, 8, generator=generator) + 0.3 for scale in (1.0, 3.0, 2.0)]


def args(observer: str, symmetric: bool = False, **more: float) -> QuantArgs:
    formula = "signed" if symmetric else "gptq"
    return QuantArgs(8, symmetric, "tensor", None, formula=formula, observer=observer, **more)  # type: ignore[arg-type]


def ends(kind: QuantArgs) -> tuple[float, float]:
    seen = Range(kind)
    for batch in batches():
        seen.update(batch)
    found = seen.ends()
    assert found is not None
    return float(found[0]), float(found[1])


def test_min_max() -> None:
    values = torch.cat(batches())
    assert ends(args("minmax")) == (float(values.min()), float(values.max()))


def test_moving_average() -> None:
    lows, highs = ([float(end(batch)) for batch in batches()] for end in (torch.min, torch.max))
    expected = [(0.95 * (0.95 * e[0] + 0.05 * e[1]) + 0.05 * e[2]) for e in (lows, highs)]
    assert ends(args("average")) == pytest.approx(tuple(expected), rel=1e-6)


@pytest.mark.parametrize("percentile", [99.0, 90.0, 100.0])
def test_percentile(percentile: float) -> None:
    """That percentage of the 1200 values is at most the upper end, and the same percentage at least the lower end."""
    values = torch.cat(batches()).flatten().sort().values
    rank = round(1200 * percentile / 100)
    assert ends(args("percentile", percentile=percentile)) == (float(values[1200 - rank]), float(values[rank - 1]))
    low, high = ends(args("percentile", symmetric=True, percentile=percentile))
    assert -low == high == float(values.abs().sort().values[rank - 1])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_mse_is_the_best_of_all_shrunk_ranges(symmetric: bool) -> None:
    kind = QuantArgs(3, symmetric, "tensor", None, formula="signed" if symmetric else "gptq", observer="mse")
    values = torch.cat(batches()).double()

    def error(low: Tensor, high: Tensor) -> float:
        scale, zero = grid_of(low, high, kind)
        codes = ((values / scale).round() + zero).clamp(0, 7)
        return float(((codes - zero) * scale - values).abs().pow(2.4).sum())

    low, high = (end.double() for end in (values.min(), values.max()))
    best = min(error(low * (1 - step / 100), high * (1 - step / 100)) for step in range(80))
    found = ends(kind)
    assert error(torch.tensor(found[0]).double(), torch.tensor(found[1]).double()) == pytest.approx(best, rel=1e-3)
    assert best < error(low, high)


def test_a_sample_holds_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tokens are sampled, so that a channel that is always large is included."""
    monkeypatch.setattr("lmpress.calibrate.observers.SAMPLE", 100)
    for channel in range(8):
        seen = Range(args("percentile", percentile=100.0))
        x = torch.cat(batches())
        x[:, channel] += 1000
        seen.update(x)
        found = seen.ends()
        assert found is not None and float(found[1]) > 900 and len(seen._samples[0]) < 200


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "mse"])
def test_a_layer_that_no_token_reached_has_no_range(observer: str) -> None:
    seen = Range(args(observer))
    seen.update(torch.zeros(0, 8))
    assert seen.ends() is None


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_round_to_the_formula(bits: int, symmetric: bool) -> None:
    x = torch.cat(batches()).double()
    kind = inputs_per("token", dynamic=True, bits=bits, symmetric=symmetric)
    found = fake_quantize(x.float(), kind).double()
    for row, got in zip(x[::37], found[::37], strict=True):
        if symmetric:
            scale = row.abs().max() / (2 ** (bits - 1) - 1)
            expected = (row / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        else:
            low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
            scale = (high - low) / (2**bits - 1)
            zero = round(-low / scale)
            expected = ((row / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
        assert torch.allclose(got, expected, atol=1e-5)


def test_one_sided_inputs_gain_a_bit_from_asymmetry() -> None:
    x = torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
    error = [(fake_quantize(x, inputs_per("token", True, symmetric=s)) - x).square().mean() for s in (True, False)]
    assert float(error[0] / error[1]) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme(inputs=inputs_per("token", dynamic=False)), "no static scales per token: tokens are not known"),
        (lambda: Scheme(inputs=inputs_per("channel", dynamic=True)), "a product sums over the input channels"),
        (lambda: Scheme(inputs=QuantArgs(formula="signed", dynamic=True)), "no dynamic scales per group"),
        (lambda: Scheme(QuantArgs(dynamic=True)), "weights do not change from call to call"),
        (lambda: Scheme(QuantArgs(strategy="token", group_size=None)), "weights have no tokens"),
        (lambda: Scheme(QuantArgs(observer="average")), "static weights are not observed by average; use observer minmax or"),
        (
            lambda: Scheme(inputs=QuantArgs(8, True, "token", None, "signed", observer="mse", dynamic=True)),
            "dynamic inputs are not observed by mse; use observer minmax",
        ),
        (lambda: Scheme(inputs=QuantArgs(8, False, "tensor", None, "awq")), "inputs have no 'awq' grid"),
        (lambda: QuantArgs(percentile=20), "percentile must be above 50"),
    ],
)  # fmt: skip
def test_invalid_combinations_are_refused_with_the_reason(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # type: ignore[operator]

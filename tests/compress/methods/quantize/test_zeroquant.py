"""ZeroQuant's grids over runs of the flattened matrix, against the formulas written out value by value."""

from pathlib import Path

import pytest
import torch

import lmpress
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.methods.quantize.zeroquant import ZeroQuant, quantize
from lmpress.errors import UsageError
from lmpress.recipes import schema
from lmpress.recipes.scheme import QuantArgs, Scheme

CHANNEL = QuantArgs(bits=8, strategy="channel", group_size=None, formula="ds", scale_dtype="float32")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("runs", [1, 3, 12])
def test_published_grids(bits: int, symmetric: bool, runs: int) -> None:
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(bits))
    args = QuantArgs(bits, symmetric, "channel", None, "ds", scale_dtype="float32")
    ours = quantize(weight, args, runs).dequantize()
    for run, values in enumerate(weight.flatten().double().chunk(runs)):
        rows = ours[run * 12 // runs : (run + 1) * 12 // runs].flatten().double()
        if symmetric:
            scale = 2 * float(values.abs().max()) / 2**bits
            expected = [
                scale * min(max(round(v / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) for v in values.tolist()
            ]
        else:
            scale = float(values.max() - values.min()) / 2**bits
            offset = round(float(values.min()) / scale)
            expected = [scale * (min(max(round(v / scale) - offset, 0), 2**bits - 1) + offset) for v in values.tolist()]
        torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_without_runs_it_is_rounding_to_nearest() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    args = QuantArgs(bits=4, group_size=8, formula="signed")
    assert torch.equal(quantize(weight, args).codes, round_to_nearest(weight, args).codes)


def test_a_range_on_one_side_of_zero_keeps_a_zero_that_can_be_stored() -> None:
    weight = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) + 1
    for values in (weight, -weight):
        tensor = quantize(values, QuantArgs(4, False, "group", 8, "ds"))
        assert tensor.zero is not None and tensor.zero.max() <= 15
        assert (tensor.dequantize() - values).abs().max() < 2.0  # saturated, but never of the other sign


@pytest.mark.parametrize("bad", [{"runs": -1}, {"runs": 4, "scheme": Scheme(QuantArgs(group_size=8))}])
def test_invalid_runs_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        ZeroQuant(**bad)
    with pytest.raises(UsageError, match=r"runs=5 does not divide the 12 rows of q"):
        quantize(torch.ones(12, 4), CHANNEL, 5, "q")


def test_mixed_precision_by_overrides(tiny: Path, tmp_path: Path) -> None:
    mixed = {
        "passes": [{"method": "zeroquant", "scheme": {"weights": {"bits": 8, "group_size": 8, "formula": "signed"}}}],
        "overrides": {"*.mlp.*": {"bits": 4}},
    }
    report = lmpress.run(tiny, tmp_path / "out", schema.build(mixed))
    assert {(".mlp." in str(layer["name"]), layer["bits"]) for layer in report.layers} == {(True, 4), (False, 8)}
    assert lmpress.load(tmp_path / "out")(input_ids=torch.arange(8).unsqueeze(0)).logits.isfinite().all()

"""LoRC against the singular value decomposition in float64, its properties in rank and weighting, and its checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.methods.reconstruct import lorc
from lmpress.compress.methods.reconstruct.lorc import LoRC, leading_eigenvectors, low_rank
from lmpress.compress.solver.loss import layer_loss
from lmpress.errors import UsageError
from lmpress.kernels.modules.low_rank import LowRankLinear
from lmpress.recipes.schema import build
from lmpress.recipes.scheme import QuantArgs


def layer(rows: int = 48, columns: int = 64) -> tuple[Tensor, Tensor]:
    """The error of rounding to 3 bits, and the Hessian of inputs with channels of very different magnitudes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(200, columns, generator=generator) * torch.logspace(1, -1, columns)
    rounded = round_to_nearest(weight, QuantArgs(bits=3, group_size=32)).dequantize()
    return weight - rounded, 2 * x.T @ x


def left_over(error: Tensor, hessian: Tensor, rank: int, weighted: bool = True) -> float:
    norm = hessian if weighted else torch.eye(len(hessian))
    left, right = low_rank(error, norm, rank)
    assert left.dtype == right.dtype == torch.float16
    return layer_loss(error.double() - left.double() @ right.double(), hessian.double())


def optimum(error: Tensor, hessian: Tensor, rank: int) -> float:
    """The least loss, half the sum of squares of the other singular values of `E L` with `H = L L^T`."""
    root = torch.linalg.cholesky(hessian.double())
    return float(torch.linalg.svdvals(error.double() @ root)[rank:].square().sum()) / 2


@pytest.mark.parametrize("rank", [1, 4, 16, 40])
def test_no_term_of_that_rank_is_better(rank: int) -> None:
    error, hessian = layer()
    best = optimum(error, hessian, rank)
    assert best <= left_over(error, hessian, rank) <= 1.001 * best


def test_the_loss_falls_with_the_rank_and_is_zero_at_full_rank() -> None:
    error, hessian = layer()
    whole = layer_loss(error.double(), hessian.double())
    losses = [left_over(error, hessian, rank) for rank in range(1, 49)]
    for before, after in zip([whole, *losses], losses, strict=False):
        assert after <= before + 1e-6 * whole
    assert losses[-1] < 1e-5 * whole
    left, right = low_rank(error, hessian, 48)
    assert torch.allclose(left.float() @ right.float(), error, rtol=0, atol=2e-3 * float(error.abs().max()))


@pytest.mark.parametrize("rank", [2, 8])
def test_weighting_by_the_inputs_beats_plain_singular_vectors(rank: int) -> None:
    error, hessian = layer()
    plain, weighted = left_over(error, hessian, rank, weighted=False), left_over(error, hessian, rank)
    assert weighted < 0.8 * plain
    expected = torch.linalg.svdvals(error.double())[rank:].square().sum()
    left, right = low_rank(error, torch.eye(64), rank)
    assert float((error.double() - left.double() @ right.double()).square().sum()) == pytest.approx(
        float(expected), rel=1e-3
    )


def test_subspace_iteration_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    error, hessian = layer(200, 64)
    monkeypatch.setattr(lorc, "EXACT_ROWS", 0)
    for rank in (1, 8, 30):
        basis = leading_eigenvectors(error, hessian, rank)
        assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-5)
        assert left_over(error, hessian, rank) <= 1.02 * optimum(error, hessian, rank)


def test_without_error_the_term_is_zero() -> None:
    left, right = low_rank(torch.zeros(8, 16), torch.eye(16), 4)
    assert not (left @ right).any() and left.isfinite().all() and right.isfinite().all()


GRID = {"weights": {"bits": 3, "symmetric": False, "group_size": 16}}
W8A8 = {
    "weights": {"bits": 8, "strategy": "channel", "group_size": None, "formula": "signed"},
    "inputs": {"bits": 8, "strategy": "token", "group_size": None, "formula": "signed", "dynamic": True},
}
BASES = {
    "gptq": {"method": "gptq", "scheme": GRID},
    "spqr": {"method": "spqr", "scheme": {"weights": GRID["weights"] | {"formula": "spqr", "scale_dtype": "bilevel"}}},
    "nf4": {"method": "nf4"},
    "w8a8": {"method": "rtn", "scheme": W8A8},
    "llm-int8": {"method": "llm-int8"},
}


@pytest.fixture
def calibration(tmp_path: Path) -> dict[str, object]:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 30)
    return {"data": str(tmp_path / "text.txt"), "samples": 8, "seq_len": 16}


@pytest.mark.parametrize("base", BASES)
def test_after_any_quantizer(base: str, tiny: Path, tmp_path: Path, calibration: dict[str, object]) -> None:
    errors = {}
    for name, passes in {"alone": [BASES[base]], "with": [BASES[base], {"method": "lorc", "rank": 4}]}.items():
        report = lmpress.run(tiny, tmp_path / name, build({"passes": passes, "calibration": calibration}))
        assert report.bytes_after == (tmp_path / name / "model.safetensors").stat().st_size
        found = lmpress.evaluate(tmp_path / name, str(tmp_path / "text.txt"), seq_len=16, against=tiny)
        errors[name] = found.kl, sum(layer.nbytes for layer in report.plan.layers)
    assert errors["with"][0] < errors["alone"][0]
    shapes = [layer.shape for layer in report.plan.layers]
    assert errors["with"][1] - errors["alone"][1] == sum(2 * 4 * (rows + columns) for rows, columns in shapes)
    assert all(figures["loss"] < figures["uncompensated_loss"] for figures in report.layers)
    model = lmpress.load(tmp_path / "with")
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == len(shapes)
    with pytest.raises(ValueError, match="config_groups"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "with")


def test_the_module_computes_the_sum(tiny: Path, tmp_path: Path, calibration: dict[str, object]) -> None:
    passes = [{"method": "rtn", "scheme": GRID}, {"method": "lorc", "rank": 1000}]
    lmpress.run(tiny, tmp_path / "out", build({"passes": passes, "calibration": calibration}))
    original, model = lmpress.load(tiny), lmpress.load(tmp_path / "out")
    ids = torch.arange(2, 10).unsqueeze(0)
    with torch.no_grad():
        expected = original(ids).logits
        assert (model(ids).logits - expected).abs().max() < 1e-2 * expected.std()
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert groups[0]["rank"] == min(original.get_submodule(groups[0]["targets"][0]).weight.shape)
    model.to(torch.bfloat16)
    with torch.no_grad():
        assert (model(ids).logits.float() - expected).abs().max() < 0.1 * expected.std()


def test_exports_keep_the_sum_or_are_refused(tiny: Path, tmp_path: Path, calibration: dict[str, object]) -> None:
    passes = [{"method": "rtn", "scheme": GRID}, {"method": "lorc"}]
    lmpress.run(tiny, tmp_path / "out", build({"passes": passes, "calibration": calibration}))
    with pytest.raises(UsageError, match="does not store low_rank weights"):
        lmpress.export(tmp_path / "out", tmp_path / "gptq", format="gptq")
    lmpress.export(tmp_path / "out", tmp_path / "fp32", format="fp32")
    ids = torch.arange(2, 10).unsqueeze(0)
    with torch.no_grad():
        left, right = (lmpress.load(tmp_path / name)(ids).logits for name in ("out", "fp32"))
    assert torch.allclose(left, right, atol=1e-5)
    with pytest.raises(UsageError, match="low_rank"):
        lmpress.run(
            tiny, tmp_path / "no", build({"passes": passes, "calibration": calibration}), target=["transformers"]
        )


def test_it_needs_a_quantizer_before_it() -> None:
    with pytest.raises(UsageError, match="nothing to improve on"):
        build({"passes": [{"method": "lorc"}]})
    with pytest.raises(UsageError, match="rank must be at least 1, got 0"):
        LoRC(rank=0)

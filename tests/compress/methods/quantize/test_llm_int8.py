"""LLM.int8 against its formula in float64: order of errors, choice of columns, compensation, module, checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.calibrate.statistics.hessian import Hessian
from lmpress.compress.block import Linear
from lmpress.compress.formats.kinds.outlier_columns import LLMInt8 as Format
from lmpress.compress.formats.kinds.outlier_columns import kept_columns
from lmpress.compress.methods.quantize.llm_int8 import SCHEME, LLMInt8, choose_columns, quantize_with_outliers
from lmpress.compress.solver.loss import layer_loss
from lmpress.errors import UsageError
from lmpress.kernels.activations import decompose
from lmpress.kernels.modules.linear import PackedLinear, kernels_of
from lmpress.kernels.modules.replace import replace_linear
from lmpress.kernels.tensor import OutlierColumnsTensor
from lmpress.recipes.schema import build
from lmpress.recipes.scheme import QuantArgs, Scheme

INPUTS = SCHEME.inputs
assert INPUTS is not None
WIDTH, OUTLIER = 96, [7, 50]


def layer() -> tuple[Tensor, Tensor]:
    """A weight `[48, 96]`, and inputs of 40 tokens with two channels that are forty times as large as the rest."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, WIDTH, generator=generator) / 10, torch.randn(40, WIDTH, generator=generator)
    x[:, OUTLIER] *= 40
    return weight, x


def mixed(
    weight: Tensor, columns: list[int], threshold: float = 6.0, hessian: Hessian | None = None
) -> OutlierColumnsTensor:
    args = replace(SCHEME.weights, outliers=max(len(columns), 1) / WIDTH)
    linear = Linear("layer", weight, args, hessian)
    return quantize_with_outliers(
        linear, torch.tensor(columns, dtype=torch.int64), replace(INPUTS, threshold=threshold)
    )


def module(tensor: OutlierColumnsTensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, 48, bias=False))
    replace_linear(model, "0", tensor)
    return model


def formula(x: Tensor, weight: Tensor, kept: list[int], threshold: float) -> Tensor:
    """The published product in float64, split into outliers and the rest; `kept` columns have 16-bit weights."""
    x, weight = x.double(), weight.double()
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round()
    outliers = [j for j in range(x.shape[1]) if j in kept or (threshold and bool((x[:, j].abs() >= threshold).any()))]
    inliers = x.clone()
    inliers[:, outliers] = 0
    per_token = inliers.abs().amax(1, keepdim=True) / 127
    per_token[per_token == 0] = 1
    y = (inliers / per_token).round() @ codes.T * per_token * scale.T
    for j in outliers:
        column = weight[:, j].half().double() if j in kept else codes[:, j] * scale[:, 0]
        y += x[:, j : j + 1] * column
    return y


def error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    expected = x.double() @ weight.double().T
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("kept", [OUTLIER, [7], []], ids=["all", "one", "none"])
@pytest.mark.parametrize("rows", [40, 1, 0])
def test_the_module_computes_the_formula(kept: list[int], threshold: float, rows: int) -> None:
    weight, x = layer()
    x = x[:rows]
    found = module(mixed(weight, kept, threshold))(x)
    assert torch.allclose(found.double(), formula(x, weight, kept, threshold), rtol=0, atol=1e-3 * 40)
    assert torch.allclose(found.double(), formula(x, weight, kept, threshold), rtol=1e-3, atol=2e-3)


def test_errors_have_the_published_order_and_16_bits_lower_them() -> None:
    weight, x = layer()

    def per_tensor(t: Tensor) -> Tensor:
        return (t / (t.abs().max() / 127)).round() * (t.abs().max() / 127)

    def per_row(t: Tensor) -> Tensor:
        scale = t.abs().amax(1, keepdim=True) / 127
        return (t / scale).round() * scale

    kept = error(module(mixed(weight, OUTLIER))(x), x, weight)
    dequantized = error(module(mixed(weight, []))(x), x, weight)
    vectors = error(module(mixed(weight, [], threshold=0))(x), x, weight)
    tokens = error(per_row(x) @ per_tensor(weight).T, x, weight)
    tensors = error(per_tensor(x) @ per_tensor(weight).T, x, weight)
    assert kept < dequantized < vectors <= tokens <= tensors
    assert kept <= 0.4 * dequantized


def test_without_outliers_the_threshold_changes_nothing() -> None:
    weight, x = layer()
    x = x.clamp(-5.9, 5.9)
    on, off = (module(mixed(weight, [], threshold))(x) for threshold in (6.0, 0.0))
    assert torch.equal(on, off)


@pytest.mark.parametrize("case", ["zero rows", "all outliers", "one token", "zeros"])
def test_edge_cases_are_finite_and_right(case: str) -> None:
    weight, x = layer()
    cases = {"zero rows": x.index_fill(0, torch.tensor([0, 3]), 0), "all outliers": x.sign() * 50, "one token": x[:1]}
    x = cases.get(case, torch.zeros_like(x))
    found = module(mixed(weight, OUTLIER))(x)
    assert torch.allclose(found.double(), formula(x, weight, OUTLIER, 6.0), rtol=1e-3, atol=2e-3)
    assert not found[x.abs().sum(1) == 0].any()


def test_the_module_equals_the_decomposition_of_calibration() -> None:
    weight, x = layer()
    for kept in (OUTLIER, [7]):
        tensor = mixed(weight, kept)
        rounded = decompose(x.view(4, 10, WIDTH), tensor.inputs, tensor.columns).view(40, WIDTH)
        expected = rounded.double() @ tensor.dequantize(torch.float64).T
        assert torch.allclose(module(tensor)(x).double(), expected, rtol=1e-4, atol=1e-3)


def test_columns_are_chosen_by_the_magnitudes_without_them() -> None:
    """Brute force: the next column is the one whose removal lowers the sum of squared maxima most."""
    _, x = layer()
    for count in (1, 2, 5):
        rest, expected = x.clone().double(), []
        for _ in range(count):
            sums = []
            for j in range(WIDTH):
                without = rest.clone()
                without[:, j] = 0
                sums.append(float(without.abs().amax(1).square().sum()))
            expected.append(min(range(WIDTH), key=lambda j: (sums[j], j)))
            rest[:, expected[-1]] = 0
        largest = x.abs().topk(count + 1, dim=1)
        assert choose_columns(largest.values, largest.indices, count, WIDTH).tolist() == sorted(expected)
        if count == 2:
            assert sorted(expected) == OUTLIER


def test_columns_without_any_token() -> None:
    none = torch.zeros(0, 1)
    assert choose_columns(none, none.long(), 3, 10).tolist() == [0, 1, 2]


def test_solving_lowers_the_loss_and_kept_columns_compensate() -> None:
    weight, x = layer()
    x[:, 1:7] += x[:, 7:8] / 10  # errors that the kept column can compensate
    statistic = Hessian(WIDTH)
    statistic.update(x, sequences=1)
    matrix = statistic.matrix()
    rounded, solved = mixed(weight, OUTLIER), mixed(weight, OUTLIER, hessian=statistic)
    losses = [layer_loss(weight - t.dequantize(), matrix) for t in (rounded, solved)]
    assert losses[1] < 0.7 * losses[0]
    plain = replace(solved, outliers=weight[:, OUTLIER].half())
    assert losses[1] < layer_loss(weight - plain.dequantize(), matrix)
    # No other values of the kept columns are better: least squares, but for their damping and 16 bits.
    others = [j for j in range(WIDTH) if j not in OUTLIER]
    lost = (weight - solved.dequantize())[:, others].double()
    best = (
        weight[:, OUTLIER].double()
        + torch.linalg.lstsq(x[:, OUTLIER].double(), x[:, others].double() @ lost.T).solution.T
    )
    optimum = solved.dequantize(torch.float64)
    optimum[:, OUTLIER] = best.half().double()
    assert losses[1] <= 1.05 * layer_loss(weight.double() - optimum, matrix.double())


def test_packing_is_exact_and_planned() -> None:
    weight, _ = layer()
    tensor, storing = mixed(weight, OUTLIER), Format(INPUTS)
    packed = storing.pack("p", tensor)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in packed.items()} == {
        name: (spec.torch_dtype, spec.shape) for name, spec in storing.spec("p", tensor.args, 48, WIDTH).items()
    }
    found = storing.unpack("p", packed, tensor.args)
    assert torch.equal(found.dequantize(), tensor.dequantize()) and found.inputs == INPUTS
    assert [kept_columns(SCHEME.weights, n) for n in (1, 50, 64, 172, 4096)] == [1, 1, 2, 4, 82]
    assert kept_columns(replace(SCHEME.weights, outliers=0.1), 30) == 3  # 0.1 * 30 is a little more than 3


def test_the_module_returns_its_tensor_unchanged_after_casts() -> None:
    weight, x = layer()
    tensor = mixed(weight, OUTLIER)
    model = module(tensor)
    packed = model[0]
    assert isinstance(packed, PackedLinear)
    assert list(kernels_of(model)) == [f"{packed.kernel} token"]
    model.to(torch.bfloat16)
    assert packed.compressed.inputs == tensor.inputs
    for part in ("codes", "scale", "columns", "outliers"):
        assert torch.equal(getattr(packed.compressed, part), getattr(tensor, part))
    assert error(model(x.bfloat16()).float(), x, weight) < 0.02


@pytest.mark.parametrize("quality", ["fast", "balanced"])
def test_a_checkpoint_has_the_planned_bytes_and_other_runtimes_refuse_it(
    tiny: Path, tmp_path: Path, quality: str
) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 60)
    out, data = tmp_path / "out", str(tmp_path / "text.txt")
    report = lmpress.quantize(tiny, out, method="llm-int8", quality=quality, calib=data, samples=4, seq_len=16)
    assert report.bytes_after == (out / "model.safetensors").stat().st_size
    assert all(figures["kept_columns"] == 1 for figures in report.layers)
    found = lmpress.evaluate(out, data, seq_len=16, against=tiny)
    assert found.kl is not None and found.kl < 1e-2
    assert json.loads((out / "config.json").read_text())["quantization_config"]["threshold"] == 6.0
    with pytest.raises(ValueError, match="config_groups"):
        AutoModelForCausalLM.from_pretrained(out)


def test_outlier_channels_do_not_raise_the_perplexity(tmp_path: Path, assets: Path) -> None:
    """Within 1 % of the original perplexity, on a model for which plain W8A8 is at least 5 % worse."""
    model, text = assets / "models" / "stories260K-outlier", assets / "data" / "tinystories"
    calib = str(text / "train.jsonl")
    lmpress.quantize(model, tmp_path / "out", method="llm-int8", calib=calib, samples=16, seq_len=256)
    found = lmpress.evaluate(tmp_path / "out", text / "test.jsonl", seq_len=256, rows=8, against=model)
    assert found.perplexity_base is not None
    assert found.perplexity == pytest.approx(found.perplexity_base, rel=0.01)
    plain = build({"passes": [{"method": "rtn", "scheme": {"weights": PER_ROW, "inputs": PER_TOKEN}}]})
    lmpress.run(model, tmp_path / "plain", plain)
    worse = lmpress.evaluate(tmp_path / "plain", text / "test.jsonl", seq_len=256, rows=8)
    assert worse.perplexity > 1.05 * found.perplexity_base


PER_ROW = {"bits": 8, "strategy": "channel", "group_size": None, "formula": "signed"}
PER_TOKEN = {"bits": 8, "strategy": "token", "group_size": None, "formula": "signed", "dynamic": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "llm-int8", "bits": 4}, "need weights of 8 bits"),
        ({"method": "llm-int8", "options": {"outliers": 0}}, "needs weights with 16-bit columns"),
        ({"method": "llm-int8", "options": {"threshold": -1}}, "must be 0 or more"),
        ({"method": "gptq", "options": {"threshold": 3}}, "does not quantize inputs"),
        ({"method": "rtn", "options": {"outliers": 0.1}}, "have no outliers"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(tiny: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lmpress.quantize(tiny, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_schemes_and_configs_are_checked() -> None:
    with pytest.raises(UsageError, match="share of the columns"):
        LLMInt8(Scheme())
    with pytest.raises(UsageError, match="inputs of 8 bits per token"):
        Scheme(SCHEME.weights)
    with pytest.raises(UsageError, match="inputs of 8 bits per token"):
        Scheme(SCHEME.weights, QuantArgs(8, True, "tensor", None, "signed"))

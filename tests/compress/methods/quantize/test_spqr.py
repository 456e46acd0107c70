"""SpQR: the bilevel grid, leave-one-out, identities I1 and I7, and equality of the stored and the evaluated weight."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lmpress
from lmpress.calibrate.statistics.hessian import Hessian
from lmpress.compress.block import Block, Linear
from lmpress.compress.formats.kinds import bilevel as stored
from lmpress.compress.methods.quantize import spqr
from lmpress.compress.methods.quantize.gptq import GPTQ, Prepared, prepare
from lmpress.compress.methods.quantize.spqr import SpQR, choose_outliers, search_levels, solve
from lmpress.compress.solver.loss import layer_loss
from lmpress.compress.solver.sweep import sweep
from lmpress.errors import UsageError
from lmpress.kernels.tensor import Bilevel
from lmpress.kernels.tensor.grid import Grid, encode, parameters
from lmpress.recipes.scheme import QuantArgs

ARGS = replace(spqr.GRID, group_size=16, outliers=0.02)
SHAPES = [(32, 64), (20, 50), (1, 16), (17, 1), (3, 172)]


def layer(rows: int, width: int, args: QuantArgs = ARGS, seed: int = 0) -> tuple[Tensor, Prepared, QuantArgs]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2 * width + 8, width, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64) ** 3  # heavy tails
    args = args.for_width(width)
    return weight, prepare(2 * inputs.T @ inputs, args, GPTQ()), args


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_stored_tensors_are_the_evaluated_weight_and_their_size_is_the_formula(
    rows: int, width: int, bits: int
) -> None:
    weight, prepared, args = layer(rows, width, replace(ARGS, bits=bits))
    tensor, _ = solve(weight, prepared, args, 1)
    packed = stored.pack("layer", tensor)
    spec = stored.spec("layer", args, rows, width)
    assert {name: tuple(t.shape) for name, t in packed.items()} == {name: s.shape for name, s in spec.items()}
    assert {name: t.dtype for name, t in packed.items()} == {name: s.torch_dtype for name, s in spec.items()}
    again = stored.unpack("layer", packed, args)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert torch.equal(again.codes, tensor.codes)
    assert len(tensor.values) == round(args.outliers * rows * width)


def test_bits_per_weight_are_those_of_the_published_formula() -> None:
    """I7: w + (b_s + b_z)/g + 64/(g * g2), and 16 bits of value with 16 of column for every outlier."""
    args = QuantArgs(bits=3, symmetric=False, group_size=16, formula="spqr", scale_dtype="bilevel", outliers=1 / 64)
    spec = stored.spec("layer", args, 1024, 1024)
    size = {name.removeprefix("layer.weight_"): 8 * s.nbytes / 1024**2 for name, s in spec.items()}
    assert size["tiles"] == 3 + 6 / 16 + 64 / 256 == 3.625
    assert size["columns"] + size["values"] == 32 / 64
    assert size["counts"] + size["shape"] == (16 * 1024 + 128) / 1024**2


def test_an_outlier_is_exact_although_no_code_is_zero() -> None:
    """The published format adds the full weight to `dequantize(quantize(0))`, which is not 0 with a real-valued zero."""
    weight, prepared, args = layer(32, 64)
    tensor, _ = solve(weight, prepared, args, 0)
    rows = torch.arange(32).repeat_interleave(tensor.counts)
    dense, decoded = (t[rows, tensor.columns] for t in (tensor.dense(torch.float64), tensor.dequantize(torch.float64)))
    value = dense + tensor.values.double()
    assert torch.equal(decoded, value)
    grid = tensor.grid(torch.float64)
    scale, zero = (t[rows, tensor.columns // 16] for t in (grid.scale, grid.zero))
    of_zero = (encode(torch.zeros_like(scale), scale, zero, args) - zero) * scale
    assert (of_zero.abs() > 1e-3 * scale).any()  # the defect would have shown here


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_bookkeeping_identity(dtype: torch.dtype, tolerance: float) -> None:
    weight, prepared, args = layer(24, 80)
    weight, upper = weight.to(dtype), prepared.factor.upper.to(dtype)
    order = prepared.order
    grid = Grid(torch.full((24, 5), 0.3, dtype=dtype), torch.full((24, 5), 7.3, dtype=dtype), args)
    outlier = torch.zeros(24, 80, dtype=torch.bool)
    outlier[::5, ::7] = True
    quantized = weight.T.contiguous()[order]
    errors = sweep(quantized, upper, spqr._Projection(grid, outlier, order))
    delta = weight.T[order] - quantized
    assert (delta - (errors.T @ upper).T).norm() <= tolerance * delta.norm()
    damped = (prepared.hessian + prepared.shift * torch.eye(80, dtype=torch.float64)).to(dtype)[order][:, order]
    assert float(errors.double().square().sum()) / 2 == pytest.approx(layer_loss(delta.T, damped), rel=tolerance)


def test_leaving_one_out_equals_a_fit_per_weight() -> None:
    """Brute force: refit the grid of a group without each of its weights, and compare the errors of the others."""
    weight, _, args = layer(6, 32)
    sensitivity = torch.rand(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = spqr._Groups(weight, sensitivity, args)
    found = groups.join(spqr._reductions(groups, torch.zeros_like(groups.values, dtype=torch.bool)))

    def error(values: Tensor, weights: Tensor) -> float:
        scale, zero = parameters(values.min(), values.max(), args)
        quantized = (encode(values, scale, zero, args) - zero) * scale
        return float(((values - quantized) ** 2 * weights).sum())

    for row in range(6):
        for column in range(32):
            part = slice(column // 16 * 16, column // 16 * 16 + 16)
            rest = torch.arange(16) != column % 16
            values, weights = weight[row, part], sensitivity[part]
            expected = error(values, weights) - error(values[rest], weights[rest])
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_more_outliers_lower_the_error_and_zero_is_allowed() -> None:
    losses = []
    for share in (0.0, 0.01, 0.05, 0.2):
        weight, prepared, args = layer(64, 128, replace(ARGS, outliers=share))
        tensor, rounded = solve(weight, prepared, args, 0)
        assert len(tensor.values) == round(share * weight.numel())
        losses.append(layer_loss(weight - tensor.dequantize(torch.float64), prepared.hessian))
        assert losses[-1] < layer_loss(weight - rounded.dequantize(torch.float64), prepared.hessian)
    assert losses == sorted(losses, reverse=True)


def test_outliers_are_the_large_weights() -> None:
    weight, prepared, args = layer(16, 64)
    weight = weight.clamp(-1, 1)
    weight[[3, 9, 15], [5, 40, 63]] = torch.tensor([30.0, -25.0, 40.0], dtype=torch.float64)
    chosen = choose_outliers(spqr._Groups(weight, prepared.hessian.diagonal(), args), 3)
    assert chosen.nonzero().tolist() == [[3, 5], [9, 40], [15, 63]]


def test_searching_the_levels_never_raises_the_weighted_error() -> None:
    weight, prepared, args = layer(40, 64, replace(ARGS, observer="mse"))
    groups = spqr._Groups(weight, prepared.hessian.diagonal(), args)
    outlier = choose_outliers(groups, 50)
    first = tuple(Bilevel.fit(t) for t in groups.fit(outlier))
    second = search_levels(groups, (first[0], first[1]), outlier)

    def error(levels: tuple[Bilevel, ...]) -> float:
        scale, zero = (t.values(torch.float64).unsqueeze(-1) for t in levels)
        quantized = (encode(groups.values, scale, zero, args) - zero) * scale
        return float(((groups.values - quantized) ** 2 * groups.sensitivity * ~groups.split(outlier)).sum())

    assert error(second) < error(first)


def test_the_second_level_keeps_constants_and_padding_widens_nothing() -> None:
    constant = torch.full((20, 3), -0.37)
    assert torch.allclose(Bilevel.fit(constant).values(torch.float32), constant, rtol=2**-10)
    assert not Bilevel.fit(torch.zeros(16, 2)).values(torch.float32).any()
    nearly = torch.full((16, 1), 0.1) + torch.arange(16).unsqueeze(1) * 1e-7
    assert torch.allclose(Bilevel.fit(nearly).values(torch.float32), nearly, rtol=2e-3)
    ragged = torch.tensor([[5.0], [6.0]])  # fourteen rows of padding
    assert torch.allclose(Bilevel.fit(ragged).values(torch.float32), ragged, rtol=1e-3)
    spread = torch.rand(64, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    step = (spread.unflatten(0, (4, 16)).amax(1) - spread.unflatten(0, (4, 16)).amin(1)) / 7
    wrong = (Bilevel.fit(spread).values(torch.float32) - spread).abs().unflatten(0, (4, 16)).amax(1)
    assert (wrong <= 0.51 * step + 1e-3).all()


def test_constant_groups_and_dead_columns() -> None:
    weight, _, args = layer(16, 48, replace(ARGS, outliers=0.0))
    weight[:, :16], weight[:, 16:32] = 0.25, 0.0
    inputs = torch.randn(30, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs[:, 40] = 0
    tensor, rounded = solve(weight, prepare(2 * inputs.T @ inputs, args, GPTQ()), args, 1)
    assert tensor.dequantize().isfinite().all()
    assert torch.equal(rounded.dequantize()[:, :16], torch.full((16, 16), 0.25))
    assert not rounded.dequantize()[:, 16:32].any()


def test_narrow_layers_count_in_bytes_and_wide_ones_in_words() -> None:
    assert [stored.index_dtype(n) for n in (255, 256, 65535, 65536)] == [
        torch.uint8,
        torch.uint16,
        torch.uint16,
        torch.int32,
    ]


def test_groups_of_nearly_the_requested_size() -> None:
    sizes = {width: ARGS.for_width(width).columns_per_scale(width) for width in (172, 64, 50, 16, 7)}
    assert sizes == {172: 16, 64: 16, 50: 17, 16: 16, 7: 7}
    assert math.ceil(172 / 16) * 16 - 172 == 4


def test_apply_records_and_refuses() -> None:
    weight, prepared, args = layer(24, 64)
    statistic = Hessian(64, torch.float32)
    statistic.update(torch.linalg.cholesky(prepared.hessian).T.float(), sequences=1)
    linear = Linear("layer", weight.float(), args, statistic)
    spqr.apply(SpQR(), Block("block", nn.Identity(), [linear]))
    assert linear.result is not None
    assert linear.figures["outliers"] == round(0.02 * 24 * 64)
    assert linear.figures["loss"] <= linear.figures["rtn_loss"]
    with pytest.raises(UsageError, match="bilevel scales need"):
        QuantArgs(scale_dtype="bilevel")
    with pytest.raises(UsageError, match="outliers"):
        QuantArgs(outliers=0.01)


def test_a_checkpoint_loads_here_and_is_refused_elsewhere(tiny: Path, tmp_path: Path) -> None:
    """transformers loads random weights, with a warning, if it does not know the quantization method."""
    (tmp_path / "text.txt").write_text("abcdefgh" * 60)
    out = tmp_path / "out"
    data = str(tmp_path / "text.txt")
    report = lmpress.quantize(tiny, out, method="spqr", group_size=8, calib=data, samples=4, seq_len=16)
    assert report.bytes_after == (out / "model.safetensors").stat().st_size
    found = lmpress.evaluate(out, data, seq_len=16, against=tiny)
    assert found.kl is not None
    assert found.kl < 0.5
    with pytest.raises(ValueError, match="config_groups"):
        AutoModelForCausalLM.from_pretrained(out)


def test_transposed_layers_are_stored_and_served(letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """GPT-2 stores its weights as [in, out]."""
    config = GPT2Config(vocab_size=10, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    letters.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text("abcdefgh" * 60)
    data, out = str(tmp_path / "text.txt"), tmp_path / "out"
    report = lmpress.quantize(
        tmp_path / "gpt2", out, method="spqr", bits=8, group_size=8, calib=data, samples=4, seq_len=16
    )
    assert report.bytes_after == (out / "model.safetensors").stat().st_size
    found = lmpress.evaluate(out, data, seq_len=16, against=tmp_path / "gpt2")
    assert found.kl is not None
    assert found.kl < 0.05

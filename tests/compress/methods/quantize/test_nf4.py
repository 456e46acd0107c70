"""NF4 against brute force in float64, its identities and edge cases, its checkpoints, and its module."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.compress.formats.export import bitsandbytes
from lmpress.compress.methods.quantize.nf4 import SCHEME
from lmpress.compress.run import Run
from lmpress.errors import CompressError, UsageError
from lmpress.kernels.modules.linear import PackedLinear, kernels_of
from lmpress.kernels.modules.replace import replace_linear
from lmpress.kernels.modules.stored import StoredLinear
from lmpress.kernels.packing.codebook import nest, unnest
from lmpress.kernels.tensor import NF4Tensor
from lmpress.recipes.schema import build
from lmpress.recipes.scheme import QuantArgs

ARGS = replace(SCHEME.weights, dtype="float32")
PLAIN = replace(ARGS, scale_dtype="float32")
TABLE = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def relative(weight: Tensor, args: QuantArgs) -> float:
    return float((NF4Tensor.of(weight, args).dequantize() - weight).norm() / weight.norm())


def test_the_values_are_quantiles_of_the_normal_distribution() -> None:
    """Eight quantiles of the positive half and seven of the negative, divided by the largest (QLoRA, appendix E)."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    above = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values / above.max()
    assert torch.allclose(torch.tensor(TABLE, dtype=torch.float64), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", [(16, 64), (33, 70), (1, 5), (7, 172)])
def test_codes_are_the_nearest_in_blocks_of_the_flattened_matrix(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    tensor = NF4Tensor.of(weight, PLAIN)
    flat = weight.flatten().tolist()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        absmax = max(map(abs, block))
        assert float(tensor.absmax[start // 64]) == absmax
        for offset, value in enumerate(block):
            errors = [abs(entry - value / absmax) for entry in TABLE]
            found = errors[int(tensor.codes.flatten()[start + offset])]
            assert found <= min(errors) + 1e-6
    dequantized = [
        TABLE[int(code)] * float(tensor.absmax[i // 64]) for i, code in enumerate(tensor.codes.flatten().tolist())
    ]
    assert tensor.dequantize(torch.float64).flatten().tolist() == pytest.approx(dequantized, rel=1e-12)


def test_the_lower_of_two_equally_near_values_wins() -> None:
    middle = (TABLE[7] + TABLE[8]) / 2
    assert NF4Tensor.of(torch.tensor([[middle, 1.0]]), PLAIN).codes.tolist() == [[7, 15]]


def test_values_of_the_codebook_do_not_change() -> None:
    tensor = NF4Tensor.of(random(24, 128), PLAIN)
    again = NF4Tensor.of(tensor.dequantize(), PLAIN)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.dequantize(), tensor.dequantize())


def test_nested_scales_are_the_nearest_up_to_their_table() -> None:
    """Nested codes are found in a table of 65,536 cells: they differ from the nearest by at most one cell."""
    absmax = random(1, 1000).abs().flatten() + 0.1
    codes, nested, offset = nest(absmax)
    edges = [[0.1 + 0.9 * k / 2**e for k in range(2**e + 1)] for e in range(7)]
    middles = [[(a + b) / 2 for a, b in pairwise(edge)] for edge in edges]
    positive = [middle * 10.0 ** (exponent - 6) for exponent, all_of_it in enumerate(middles) for middle in all_of_it]
    table = torch.tensor(sorted([*positive, *(-value for value in positive), 0.0, 1.0]), dtype=torch.float64)
    assert len(table) == 256
    centred = absmax.double() - float(offset)
    scale = nested.double().repeat_interleave(256)[:1000]
    assert float(offset) == pytest.approx(float(absmax.double().mean()), rel=1e-6)
    assert torch.equal(nested, torch.stack([part.abs().max() for part in (absmax - offset).split(256)]))
    wrong = (table[codes.int()] - centred / scale).abs() - (table - (centred / scale).unsqueeze(1)).abs().amin(1)
    assert wrong.max() <= 1.1 / 32767.5
    dequantized = table[codes.int()] * scale + float(offset)
    assert torch.allclose(unnest(codes, nested, offset).double(), dequantized, rtol=1e-5, atol=1e-7)


def test_errors_are_ordered_as_promised() -> None:
    weight = random(256, 512)
    nested, plain = relative(weight, ARGS), relative(weight, PLAIN)
    assert abs(nested - plain) < 1e-3
    assert plain < relative(weight, replace(PLAIN, group_size=128)) < relative(weight, replace(PLAIN, group_size=1024))


@pytest.mark.parametrize("args", [ARGS, PLAIN], ids=["nested", "plain"])
def test_zeros_and_single_values(args: QuantArgs) -> None:
    weight = random(4, 64)
    weight[1] = 0
    assert NF4Tensor.of(weight, args).dequantize().isfinite().all()
    assert not NF4Tensor.of(torch.zeros(4, 64), args).dequantize().any()
    alone = torch.tensor([[-0.25]])
    assert torch.equal(NF4Tensor.of(alone, args).dequantize(), alone)


def test_bits_per_weight() -> None:
    bits = {}
    for name, args in (("nested", ARGS), ("plain", PLAIN)):
        specs = bitsandbytes.spec("p", args, 4096, 4096)
        assert {n: s for n, s in specs.items() if "absmax" in n or n == "p.weight"}
        bits[name] = sum(s.nbytes for n, s in specs.items() if "absmax" in n or n == "p.weight") * 8 / 4096**2
    assert bits == {"nested": 4 + 8 / 64 + 32 / (64 * 256), "plain": 4.5}


@pytest.mark.parametrize("shape", [(16, 64), (33, 70), (3, 5)])
@pytest.mark.parametrize("args", [ARGS, PLAIN], ids=["nested", "plain"])
def test_packing_is_exact(shape: tuple[int, int], args: QuantArgs) -> None:
    tensor = NF4Tensor.of(random(*shape), args)
    packed = bitsandbytes.pack("p", tensor)
    assert {name: safetensors_io.TensorSpec.of(part) for name, part in packed.items()} == bitsandbytes.spec(
        "p", args, *shape
    )
    found = bitsandbytes.unpack("p", packed, args)
    assert found.args == args
    for part in ("codes", "absmax", "nested", "offset"):
        left, right = getattr(found, part), getattr(tensor, part)
        assert (left is None and right is None) or torch.equal(left, right)
    first = int(packed["p.weight"][0, 0])
    assert (first >> 4, first & 15) == tuple(tensor.codes.flatten()[:2].tolist())


def test_damaged_checkpoints_are_reported() -> None:
    packed = bitsandbytes.pack("p", NF4Tensor.of(random(16, 64), ARGS))
    state = f"p.weight.{bitsandbytes.STATE}"
    other = bytes(packed[state].tolist()).replace(b'"blocksize": 64', b'"blocksize": 128', 1)
    wrong = {
        "codebook": packed | {"p.weight.quant_map": torch.linspace(-1, 1, 16)},
        "not readable": packed | {state: packed[state][:-90]},
        "blocks of 128": packed | {state: torch.tensor(list(other), dtype=torch.uint8)},
    }
    for message, tensors in wrong.items():
        with pytest.raises(CompressError, match=message):
            bitsandbytes.unpack("p", tensors, ARGS)


@pytest.mark.parametrize(("columns", "kind"), [(128, PackedLinear), (172, StoredLinear)])
def test_the_module_computes_with_the_stored_weight(columns: int, kind: type[nn.Module]) -> None:
    tensor = NF4Tensor.of(random(48, columns), ARGS)
    model = nn.Sequential(nn.Linear(columns, 48))
    replace_linear(model, "0", tensor)
    module, x = model[0], random(5, columns, seed=1)
    assert isinstance(module, kind)
    expected = x.double() @ tensor.dequantize(torch.float64).T + module.bias.double()
    assert torch.allclose(module(x).double(), expected, rtol=0, atol=1e-6)
    model.to(torch.bfloat16)
    assert torch.equal(module.compressed.dequantize(), tensor.dequantize())
    assert (model(x.bfloat16()).double() - expected).abs().max() < 0.05
    assert max(buffer.nbytes for buffer in module.buffers()) <= 48 * columns // 2


def test_a_checkpoint_has_the_planned_bytes_and_loads(tiny: Path, tmp_path: Path) -> None:
    report = lmpress.quantize(tiny, tmp_path / "out", method="nf4")
    assert report.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bnb_4bit_use_double_quant"]) == ("bitsandbytes", True)
    model, original = lmpress.load(tmp_path / "out"), lmpress.load(tiny)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | StoredLinear):
            weight = original.get_submodule(name).weight
            assert torch.equal(module.compressed.dequantize(), NF4Tensor.of(weight, ARGS).dequantize())


def test_layers_with_whole_blocks_are_served_by_a_kernel(tmp_path: Path, assets: Path) -> None:
    model = assets / "models" / "stories260K"
    lmpress.quantize(model, tmp_path / "out", method="nf4")
    assert sum(kernels_of(lmpress.load(tmp_path / "out")).values()) == 30  # 5 of 35 layers have 172 columns


def test_other_options(tiny: Path, tmp_path: Path) -> None:
    lmpress.quantize(tiny, tmp_path / "out", method="nf4", group_size=128, options={"scale_dtype": "float32"})
    stored = safetensors_io.read_header(tmp_path / "out" / "model.safetensors")
    name = next(name for name in stored if name.endswith(".weight.absmax"))
    codes = stored[name.removesuffix(".absmax")].spec
    assert stored[name].spec == safetensors_io.TensorSpec("F32", (math.ceil(codes.shape[0] * 2 / 128),))
    found = lmpress.evaluate(tmp_path / "out", "python-stdlib", seq_len=16, rows=1)
    assert math.isfinite(found.perplexity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "16 values"),
        ({"group_size": 48}, "no blocks of 48"),
        ({"symmetric": False}, "no asymmetric form"),
        ({"options": {"observer": "mse"}}, "largest magnitude"),
        ({"options": {"formula": "gptq"}}, "'nested' needs nf4 weights"),
    ],
    ids=str,
)
def test_invalid_options_of_nf4_are_refused(tiny: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lmpress.quantize(tiny, tmp_path / "out", method="nf4", **options)
    assert not (tmp_path / "out").exists()


def test_solvers_and_mixed_checkpoints_are_refused(
    tiny: Path, tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    scheme = {"weights": {"strategy": "flat", "group_size": 64, "formula": "nf4", "scale_dtype": "nested"}}
    for name in ("gptq", "obq", "zeroquant"):
        with pytest.raises(UsageError, match=f"{name} does not make .* weights; use method rtn or nf4"):
            build({"passes": [{"method": name, "scheme": scheme}]})
    grid = {"strategy": "group", "group_size": 16, "formula": "gptq", "scale_dtype": "float16"}
    with pytest.raises(UsageError, match="nf4 does not make grid weights"):
        lmpress.run(tiny, tmp_path / "out", build({"passes": [{"method": "nf4"}], "overrides": {"*.down_proj": grid}}))
    make_model("llama").save_pretrained(tmp_path / "wide")
    blocks = {"group_size": 32, "formula": "ggml"}
    mixed = build({"passes": [{"method": "rtn"}], "overrides": {"*.0.self_attn.*": blocks}, "keep": ["*.mlp.*"]})
    with pytest.raises(UsageError, match=r"0\.self_attn\.o_proj .* and .*1\.self_attn\.o_proj .* cannot be stored"):
        Run.of(tmp_path / "wide", mixed)


def test_transforms_come_before_it_and_clipping_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 60)
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 16}
    for clip in (False, True):
        passes = [{"method": "awq", "ratios": 2, "clip": clip}, {"method": "nf4"}]
        recipe = build({"passes": passes, "calibration": calibration})
        if clip:
            with pytest.raises(UsageError, match="clip=false"):
                lmpress.run(tiny, tmp_path / "clipped", recipe)
        else:
            lmpress.run(tiny, tmp_path / "out", recipe)
    found = lmpress.evaluate(tmp_path / "out", str(tmp_path / "text.txt"), seq_len=16, against=tiny)
    assert found.kl is not None and found.kl < 0.5

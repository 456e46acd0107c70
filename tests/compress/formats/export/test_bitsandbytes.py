"""Our bytes are bitsandbytes' own, plain transformers serves our checkpoints, and we serve those that it wrote."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.calibrate.model.architecture import set_weight
from lmpress.compress.formats.export import bitsandbytes as ours
from lmpress.compress.methods.quantize import llm_int8
from lmpress.compress.methods.quantize.nf4 import SCHEME
from lmpress.kernels.tensor import NF4Tensor, OutlierColumnsTensor

functional = pytest.importorskip("bitsandbytes.functional")

IDS = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(0))
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(params=DTYPES)
def llama(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Widths that are multiples of 64: bitsandbytes' CPU library misreads some others."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, request.param)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def weights(case: int) -> Tensor:
    """Many shapes and scales: ragged, with zero blocks, rounded to 16 bits, with rows of very different sizes."""
    generator = torch.Generator().manual_seed(case)
    rows, columns = (int(n) for n in torch.randint(1, 250, (2,), generator=generator))
    weight = torch.randn(rows, columns, generator=generator) * (1, 1e-3, 20, 1e-20)[case % 4]
    if case % 3 == 0:
        weight = weight.bfloat16().float()
    if case % 5 == 0:
        weight.view(-1)[:64] = 0
    if case % 7 == 0:
        weight *= torch.rand(rows, 1, generator=generator) ** 4
    return weight


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_every_byte_equals_what_bitsandbytes_writes(nested: bool) -> None:
    args = replace(SCHEME.weights, dtype="float32", scale_dtype="nested" if nested else "float32")
    for case in range(60):
        weight = weights(case)
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        packed = ours.pack("p", NF4Tensor.of(weight, args))
        theirs = {f"p.weight.{name}": part for name, part in state.as_dict(packed=True).items()} | {"p.weight": codes}
        assert packed.keys() == theirs.keys()
        said = f"p.weight.{ours.STATE}"
        assert json.loads(bytes(packed.pop(said).tolist())) == json.loads(bytes(theirs.pop(said).tolist()))
        assert [name for name in packed if not torch.equal(packed[name], theirs[name])] == []


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_served_weights_equal_what_bitsandbytes_dequantizes(nested: bool) -> None:
    args = replace(SCHEME.weights, scale_dtype="nested" if nested else "float32")
    weight = torch.randn(48, 320, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    assert torch.equal(NF4Tensor.of(weight, args).dequantize(), functional.dequantize_4bit(codes, state))


def test_plain_transformers_gives_the_same_logits(llama: Path, tmp_path: Path) -> None:
    lmpress.quantize(llama, tmp_path / "out", method="nf4", keep=["*.k_proj"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_compute_dtype"] == json.loads((llama / "config.json").read_text())["dtype"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    expected = logits(lmpress.load(tmp_path / "out"))
    # In training mode: for inference the library computes in bfloat16 if the processor supports it, as 16-bit models always do.
    tolerance = 1e-4 if config["bnb_4bit_compute_dtype"] == "float32" else 0.2
    assert (logits(model.train()) - expected).abs().max() < tolerance * expected.std()


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_checkpoints_that_bitsandbytes_wrote_are_served(llama: Path, tmp_path: Path, nested: bool) -> None:
    dtype = json.loads((llama / "config.json").read_text())["dtype"]
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    AutoModelForCausalLM.from_pretrained(llama, dtype=dtype, quantization_config=kind).save_pretrained(tmp_path / "own")
    lmpress.quantize(llama, tmp_path / "out", method="nf4", options={} if nested else {"scale_dtype": "float32"})
    left, right = (safetensors_io.read(tmp_path / name / "model.safetensors") for name in ("own", "out"))
    assert left.keys() == right.keys()
    assert [n for n in left if not n.endswith(ours.STATE) and not torch.equal(left[n], right[n])] == []
    assert torch.equal(logits(lmpress.load(tmp_path / "own")), logits(lmpress.load(tmp_path / "out")))


def test_conv1d_layers_are_served_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    shape = {"vocab_size": 40, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = GPT2Config(**shape, **dropout, initializer_range=0.2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    lmpress.quantize(tmp_path / "gpt2", tmp_path / "out", method="nf4", target=["transformers"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(lmpress.load(tmp_path / "out"))
    assert (logits(model.train()) - expected).abs().max() < 1e-4 * expected.std()


def test_llm_int8_is_exported_and_served_by_bitsandbytes(
    llama: Path, letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 60)
    letters.save_pretrained(llama)
    options = {"calib": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 16}
    lmpress.quantize(llama, tmp_path / "mixed", method="llm-int8", quality="fast", **options)
    lmpress.export(tmp_path / "mixed", tmp_path / "out", format="bitsandbytes")
    stored = safetensors_io.read(tmp_path / "out" / "model.safetensors")
    weight = lmpress.load(llama).model.layers[0].self_attn.q_proj.weight
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    ours_codes = stored["model.layers.0.self_attn.q_proj.weight"]
    assert (ours_codes.int() - codes.int()).abs().max() <= 1  # bitsandbytes rounds the weight to float16 first
    assert (ours_codes == codes).float().mean() > 0.98
    assert torch.allclose(stored["model.layers.0.self_attn.q_proj.SCB"], scales, rtol=1e-3)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits(by_hand(llama, tmp_path / "out"))
    assert (logits(lmpress.load(tmp_path / "out")) - expected).abs().max() < 1e-4 * expected.std()
    assert (logits(model) - expected).abs().max() < 0.2 * expected.std()  # it rounds the inputs too


def test_llm_int8_checkpoints_that_bitsandbytes_wrote_are_served(llama: Path, tmp_path: Path) -> None:
    kind = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=kind).save_pretrained(tmp_path / "own")
    expected = logits(by_hand(llama, tmp_path / "own"))
    assert (logits(lmpress.load(tmp_path / "own")) - expected).abs().max() < 1e-4 * expected.std()


def by_hand(model: Path, out: Path) -> nn.Module:
    """The original model with weights that are dequantized from int8 codes and the largest magnitudes of their rows."""
    dense, stored = lmpress.load(model), safetensors_io.read(out / "model.safetensors")
    layers = [name.removesuffix(".SCB") for name in stored if name.endswith(".SCB")]
    assert len(layers) == 14
    for name in layers:
        weight = stored[f"{name}.weight"].float() * stored[f"{name}.SCB"].unsqueeze(1) / 127
        set_weight(dense.get_submodule(name), weight)
    return dense


def test_outlier_columns_widen_the_exported_scales_if_necessary() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[:8, 5] *= 30
    args = replace(llm_int8.SCHEME.weights, outliers=1 / 64)
    others = torch.arange(64) != 5
    scale = weight[:, others].abs().amax(1, keepdim=True) / 127
    codes = ((weight / scale).round().clamp(-128, 127) + 128).to(torch.uint8)
    tensor = OutlierColumnsTensor(codes, scale, torch.tensor([5]), weight[:, [5]].half(), args, llm_int8.SCHEME.inputs)
    packed = ours.pack("p", tensor)
    served = packed["p.weight"].float() * packed["p.SCB"].unsqueeze(1) / 127
    assert ((served - weight).abs() <= 1.01 * packed["p.SCB"].unsqueeze(1) / 127).all()
    quiet = weight[:, 5].abs() <= 127.5 * scale[:, 0]
    assert 0 < quiet.sum() < 16
    assert torch.equal(packed["p.SCB"][quiet], scale[quiet, 0] * 127)

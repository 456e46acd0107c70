"""Whole exports: what comes out loads and is equal, what cannot be held is refused before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.compress.formats.source import open_source
from lmpress.errors import CompressError, UsageError

IDS = torch.randint(0, 16, (2, 16), generator=torch.Generator().manual_seed(0))


def model(folder: Path, tied: bool = True) -> Path:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantized(folder: Path, **options: object) -> Path:
    tied = bool(options.pop("tied", True))
    lmpress.quantize(model(folder / "model", tied), folder / "q", method="rtn", **{"group_size": 32, **options})
    return folder / "q"


def logits(path: Path) -> Tensor:
    return lmpress.load(path)(IDS).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "pack-quantized"])
def test_an_export_computes_the_same(tmp_path: Path, name: str, symmetric: bool, tied: bool) -> None:
    source = quantized(tmp_path, symmetric=symmetric, tied=tied)
    report = lmpress.export(source, tmp_path / "out", format=name)
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    weights = list(report.out.glob("*.safetensors"))
    assert report.bytes_after == sum(file.stat().st_size for file in weights)
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_plain_transformers_loads_the_dense_export(tmp_path: Path, symmetric: bool) -> None:
    source = quantized(tmp_path, symmetric=symmetric)
    lmpress.export(source, tmp_path / "out", format="fp32")
    written, checkpoint = safetensors_io.read(tmp_path / "out" / "model.safetensors"), Checkpoint.open(source)
    assert len(checkpoint.layers) == 14
    for name in checkpoint.layers:
        assert torch.equal(written[f"{name}.weight"], checkpoint.layer(name).dequantize())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32 and torch.allclose(loaded(IDS).logits, logits(source), atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_16_bit_dense_export_is_rounded_which_is_reported(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = quantized(tmp_path)
    assert lmpress.export(source, tmp_path / "out", format=name).notes == (f"weights are rounded to {name}",)
    found = safetensors_io.read(tmp_path / "out" / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    assert torch.equal(found[f"{layer}.weight"], Checkpoint.open(source).layer(layer).dequantize().to(dtype))
    assert {t.dtype for t in found.values()} == {dtype}


def test_conv1d_weights_are_exported_in_their_own_layout(tmp_path: Path, assets: Path) -> None:
    lmpress.quantize(assets / "models" / "babygpt-shakespeare-gpt2", tmp_path / "q", method="rtn", group_size=32)
    lmpress.export(tmp_path / "q", tmp_path / "out", format="fp32")
    ids = torch.arange(32)[None]
    assert torch.allclose(
        lmpress.load(tmp_path / "out")(ids).logits, lmpress.load(tmp_path / "q")(ids).logits, atol=1e-4
    )
    with pytest.raises(UsageError, match="this is a Conv1D"):
        lmpress.export(tmp_path / "q", tmp_path / "gptq", format="gptq")


def with_zero(source: Path, value: int) -> None:
    """Set the first zero of a layer to `value`, and all others that are 0 to 1."""
    file = source / "model.safetensors"
    tensors = safetensors_io.read(file)
    name = "model.layers.1.self_attn.v_proj.weight_zero_point"
    for each in [n for n in tensors if n.endswith("zero_point")]:
        nibbles = [(tensors[each] >> (4 * k)) & 15 for k in range(8)]
        tensors[each] = sum(n.clamp(min=1).long() << (4 * k) for k, n in enumerate(nibbles)).to(torch.int32)
    tensors[name][0, 0] = (int(tensors[name][0, 0]) & ~15) | value
    safetensors_io.write(file, tensors)


@pytest.mark.parametrize("zero", [0, 1])
def test_a_zero_point_of_zero_is_written_as_gptq_v2(tmp_path: Path, zero: int) -> None:
    source = quantized(tmp_path, symmetric=False)
    with_zero(source, zero)
    report = lmpress.export(source, tmp_path / "out", format="gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == ("gptq" if zero else "gptq_v2")
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    assert len(report.notes) == (0 if zero else 1)
    if not zero:
        assert "model.layers.1.self_attn.v_proj has a zero of 0" in report.notes[0]
    assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_layers_kept_dense_are_exported_dense(tmp_path: Path) -> None:
    source = quantized(tmp_path, keep=["*.mlp.*"])
    for name in ("gptq", "awq"):
        lmpress.export(source, tmp_path / name, format=name)
        assert torch.equal(logits(tmp_path / name), logits(source))
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["modules_in_block_to_quantize"] == [[f"self_attn.{p}_proj" for p in "qkvo"]]


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = quantized(tmp_path, bits=8)
    with pytest.raises(
        UsageError, match=r"model.layers.0.self_attn.q_proj cannot be exported: AWQ stores 4 bits, not 8"
    ):
        lmpress.export(source, tmp_path / "out", format="awq")
    with pytest.raises(UsageError, match="unknown format 'gptqq'; formats: pack-quantized, gptq"):
        lmpress.export(source, tmp_path / "out", format="gptqq")
    assert {p.name for p in tmp_path.iterdir()} == {"model", "q"}


def test_an_existing_output_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    source = quantized(tmp_path)
    lmpress.export(source, tmp_path / "out", format="fp16")
    with pytest.raises(UsageError, match="exists already"):
        lmpress.export(source, tmp_path / "out", format="fp32")
    lmpress.export(source, tmp_path / "out", format="fp32", overwrite=True)
    assert open_source(tmp_path / "out").config["dtype"] == "float32"


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    source = quantized(tmp_path)
    file = source / "model.safetensors"
    tensors = safetensors_io.read(file)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][0] = torch.nan
    safetensors_io.write(file, tensors)
    with pytest.raises(CompressError, match=r"model.layers.1.mlp.up_proj.weight_scale"):
        lmpress.export(source, tmp_path / "out", format="gptq")
    assert {p.name for p in tmp_path.iterdir()} == {"model", "q"}


def test_shards_take_their_tensors_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", 100)
    tensors = {f"t.{i}": torch.full((i + 1, 3), float(i)) for i in range(6)}
    with safetensors_io.streamed(tmp_path, {n: safetensors_io.TensorSpec.of(t) for n, t in tensors.items()}) as put:
        for name in reversed(tensors):
            put(name, tensors[name])
    index = json.loads((tmp_path / safetensors_io.INDEX).read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name, tensor in tensors.items():
        assert torch.equal(safetensors_io.read(tmp_path / index[name])[name], tensor)


def test_a_tensor_that_is_never_written_is_an_error(tmp_path: Path) -> None:
    specs = {"a": safetensors_io.TensorSpec("F32", (2,)), "b": safetensors_io.TensorSpec("F32", (2,))}
    with pytest.raises(CompressError, match="b was never written"), safetensors_io.streamed(tmp_path, specs) as put:
        put("a", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []

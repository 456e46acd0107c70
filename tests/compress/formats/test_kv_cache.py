"""One scale of keys and one of values per layer: stored and applied as in compressed-tensors, and read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.compress.formats.kv_cache import CACHE_RANGES, attentions
from lmpress.compress.output.record import RECORD
from lmpress.compress.plan import LayerPlan
from lmpress.compress.runtime_support import check
from lmpress.errors import CompressError, UsageError
from lmpress.eval.verify import verify
from lmpress.kernels.cache.cache import PackedCache
from lmpress.kernels.cache.packed import PackedStates
from lmpress.kernels.cache.ranges import attached
from lmpress.recipes.scheme import CacheScheme, QuantArgs

ONE = "{bits: 8, symmetric: true, strategy: tensor, group_size: null, formula: signed}"
ASYMMETRIC = "{bits: 8, symmetric: false, strategy: tensor, group_size: null, formula: spqr}"
W4 = "weights: {bits: 4, strategy: group, group_size: 8}"
W8A8 = (
    "weights: {bits: 8, strategy: channel, group_size: null, formula: signed}, "
    "inputs: {bits: 8, strategy: token, group_size: null, formula: signed, dynamic: true}"
)
IDS = torch.randint(2, 10, (2, 40), generator=torch.Generator().manual_seed(1))


def compressed(tiny: Path, out: Path, states: str = ONE, layers: str = W4) -> Path:
    letters = torch.randint(0, 8, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    (out.parent / "text.txt").write_text("".join("abcdefgh"[i] for i in letters))
    (out.parent / "recipe.yaml").write_text(
        f"passes: [{{method: rtn, scheme: {{{layers}, kv: {{window: 0, keys: {states}, values: {states}}}}}}}]\n"
        f"calibration: {{data: '{out.parent / 'text.txt'}', samples: 4, seq_len: 32}}\n"
    )
    report = lmpress.run(tiny, out, out.parent / "recipe.yaml")
    assert report.bytes_after == sum(file.stat().st_size for file in out.glob("*.safetensors"))  # the plan is exact
    return out


def edit(out: Path, **changes: Any) -> None:
    config = json.loads((out / "config.json").read_text())
    config.pop("lmpress_kv_cache")
    config["quantization_config"]["kv_cache_scheme"] |= changes
    (out / "config.json").write_text(json.dumps(config))


def rescale(out: Path, factor: float, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    tensors = safetensors_io.read(out / "model.safetensors")
    scales = {
        name: (t.float() * factor).to(dtype) for name, t in tensors.items() if name.endswith(("k_scale", "v_scale"))
    }
    safetensors_io.write(out / "model.safetensors", tensors | scales)
    return scales


def test_a_checkpoint_has_what_compressed_tensors_reads(tiny: Path, tmp_path: Path) -> None:
    out = compressed(tiny, tmp_path / "out")
    told = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert told == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    }
    stored = safetensors_io.read(out / "model.safetensors")
    scales = {name: t for name, t in stored.items() if name.endswith("_scale") and "weight" not in name}
    assert set(scales) == {f"model.layers.{i}.self_attn.{part}_scale" for i in range(2) for part in "kv"}
    assert all(t.shape == (1,) and t.dtype == torch.float16 and t > 0 for t in scales.values())
    assert not (out / CACHE_RANGES).exists()
    for layer, ends in enumerate(attached(lmpress.load(out))):
        for part, each in zip("kv", ends, strict=True):
            states = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
            scale = scales[f"model.layers.{layer}.self_attn.{part}_scale"].float()
            expected = (states / scale).round().clamp(-128, 127) * scale
            served = PackedStates.within(states, CacheScheme.shared().keys, each).states(torch.float32)
            assert torch.equal(served, expected)


def test_transformers_applies_the_scales(tiny: Path, tmp_path: Path) -> None:
    """It does not only load them: verify compares every rounded key and value, and finds a changed scale."""
    out = compressed(tiny, tmp_path / "out")
    (found,) = verify(out).findings
    assert found.ok and found.outputs is not None and found.outputs.logits < 1e-5
    other = compressed(tiny, tmp_path / "other")
    rescale(other, 8.0)
    (other / RECORD).unlink()
    (wrong,) = verify(other, against=out).findings
    assert not wrong.ok and wrong.block == 0 and wrong.steps == 0


def test_w8a8_layers_carry_the_scales_too(tiny: Path, tmp_path: Path) -> None:
    out = compressed(tiny, tmp_path / "out", layers=W8A8)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized" and config["kv_cache_scheme"]["num_bits"] == 8
    assert isinstance(lmpress.load(out)(IDS[:, :8]).past_key_values, PackedCache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checkpoints_of_other_tools_are_read(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """They have no key of lmpress in config.json, and their scales may have any dtype: they are used unchanged."""
    out = compressed(tiny, tmp_path / "out")
    edit(out)
    scales = rescale(out, 1.1, dtype)
    cache = lmpress.load(out)(IDS).past_key_values
    assert isinstance(cache, PackedCache) and cache.layers[0].scheme.window == 0
    keys, values = cache.layers[1].packed
    assert torch.equal(keys.scale.flatten(), scales["model.layers.1.self_attn.k_scale"].float())
    assert torch.equal(values.scale.flatten(), scales["model.layers.1.self_attn.v_scale"].float())
    assert keys.tokens == 32 and type(lmpress.load(out, kv_bits=16)(IDS).past_key_values) is not PackedCache
    assert lmpress.load(out, kv_bits=4)(IDS).past_key_values.layers[0].packed[0].args.bits == 4


def test_caches_of_other_tools_that_cannot_be_served_are_refused(tiny: Path, tmp_path: Path) -> None:
    out = compressed(tiny, tmp_path / "out")
    edit(out, type="float")
    with pytest.raises(UsageError, match=r"kept as 8 float tensor.*kv_bits=16"):
        lmpress.load(out)
    assert lmpress.load(out, kv_bits=16)(IDS).logits.isfinite().all()


def test_a_damaged_scale_is_named(tiny: Path, tmp_path: Path) -> None:
    out = compressed(tiny, tmp_path / "out")
    rescale(out, -1.0)
    with pytest.raises(CompressError, match=r"layers.0.self_attn.k_scale is \[-.*not one positive number"):
        lmpress.load(out)
    rescale(out, -1.0)
    tensors = safetensors_io.read(out / "model.safetensors")
    safetensors_io.write(
        out / "model.safetensors", {n: t for n, t in tensors.items() if n != "model.layers.1.self_attn.v_scale"}
    )
    with pytest.raises(CompressError, match="no tensor for"):
        lmpress.load(out)


def test_exports_keep_the_scales_or_report_that_they_do_not(tiny: Path, tmp_path: Path) -> None:
    out = compressed(tiny, tmp_path / "out")
    packed = lmpress.export(out, tmp_path / "packed", format="pack-quantized")
    assert packed.notes == () and torch.equal(lmpress.load(packed.out)(IDS).logits, lmpress.load(out)(IDS).logits)
    (found,) = verify(packed.out, against=out).findings
    assert found.ok and found.outputs is not None and found.outputs.logits < 1e-5
    dense = lmpress.export(out, tmp_path / "dense", format="fp32")
    assert any("fp32 has no place for its scales" in note for note in dense.notes)
    assert "lmpress_kv_cache" not in json.loads((dense.out / "config.json").read_text())
    assert not any(name.endswith("k_scale") for name in safetensors_io.read_header(dense.out / "model.safetensors"))


def test_other_grids_are_stored_in_a_separate_file(tiny: Path, tmp_path: Path) -> None:
    out = compressed(tiny, tmp_path / "out", ASYMMETRIC)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] is None
    assert set(safetensors_io.read(out / CACHE_RANGES)) == {
        f"layers.{i}.{role}" for i in range(2) for role in ("keys", "values")
    }
    cache = lmpress.load(out)(IDS).past_key_values
    assert all(states.low is not None and states.scale.shape == (1, 1, 1) for states in cache.layers[0].packed)


def test_attention_layers_that_compressed_tensors_does_not_recognize_are_left_out(make_model: Any) -> None:
    assert attentions(make_model("qwen3")) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert attentions(make_model("gpt2")) == []  # its projections have other names


LAYERS = [LayerPlan("m.0.q_proj", 0, "Linear", (128, 128), QuantArgs(group_size=32), 0)]


@pytest.mark.parametrize(
    ("target", "cache", "message"),
    [
        ("vllm", CacheScheme.of(8), "static scale per tensor in 8 bits only, not kv=8 bits.*gptq-w4-kv8"),
        ("vllm", CacheScheme.shared(4), "in 8 bits only, not kv=4 bits"),
        ("transformers", CacheScheme.of(4), "in 2 or 3 or 4 or 5 or 6 or 7 or 8 bits only"),
        ("llamacpp", CacheScheme.shared(), "cannot read the scales of a packed cache in gguf; leave `kv` out"),
    ],
)
def test_targets_refuse_other_caches(target: str, cache: CacheScheme, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(LAYERS, [target], cache=cache)


@pytest.mark.parametrize("target", ["vllm", "transformers", "lmpress"])
def test_targets_accept_a_cache_that_they_read(target: str) -> None:
    check(LAYERS, [target], cache=CacheScheme.shared())


def test_compressed_tensors_makes_and_names_the_same_parameters() -> None:
    """Its own reading of the scheme, on a model that lmpress never touched."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from lmpress.compress.formats.kv_cache import kv_cache_scheme

    config = LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(config)
    told = quantization.QuantizationConfig(
        config_groups={}, kv_cache_scheme=kv_cache_scheme(CacheScheme.shared()), quantization_status="compressed"
    )
    quantization.apply_quantization_config(model, told)
    attention = model.get_submodule(attentions(model)[0])
    assert {name: tuple(p.shape) for name, p in attention.named_parameters(recurse=False)} == {
        "k_scale": (1,),
        "v_scale": (1,),
    }

"""Transforms in whole runs: checkpoints load, compute what was evaluated, and have the planned size."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmpress import load, run
from lmpress.calibrate.model.safetensors_io import read_header
from lmpress.compress import workspace
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.errors import StorageError, UsageError
from lmpress.kernels.activations import quantized_inputs
from lmpress.recipes import schema
from lmpress.recipes.naming import default_out
from lmpress.recipes.options import quantization_recipe
from lmpress.recipes.scheme import QuantArgs

ASYMMETRIC = {"bits": 8, "symmetric": False, "strategy": "group", "group_size": 16}
PER_ROW = {"bits": 8, "strategy": "channel", "group_size": None, "formula": "signed"}
PER_TOKEN = {"bits": 8, "strategy": "token", "group_size": None, "formula": "signed", "dynamic": True}
STATIC = PER_TOKEN | {"strategy": "tensor", "dynamic": False}


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    letters = torch.randint(0, 8, (4000,), generator=torch.Generator().manual_seed(0))
    file.write_text("".join("abcdefgh"[i] for i in letters))
    return str(file)


@pytest.fixture
def saved(make_model, letters, tmp_path):
    """Saves the random model of an architecture in a dtype, with the letters' tokenizer."""

    def save(name: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / name
        make_model(name).to(dtype).save_pretrained(folder)
        letters.save_pretrained(folder)
        return folder

    return save


def recipe(text, *passes, **more):
    calibration = {"data": text, "samples": 8, "seq_len": 16}
    return schema.build({"passes": list(passes), "calibration": calibration, **more})


def rtn(weights=ASYMMETRIC, **inputs):
    return {"method": "rtn", "scheme": {"weights": weights, **inputs}}


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def off_by(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_eight_bits_after_a_transform_are_close_to_the_original(saved, text, random_ids, tmp_path, name, method):
    model = saved(name)
    options = {"clip": False, "ratios": 2} if method == "awq" else {}
    report = run(model, tmp_path / "out", recipe(text, {"method": method, **options}, rtn()))
    found = load(tmp_path / "out")
    assert off_by(logits(found, random_ids), logits(load(model), random_ids)) < 0.08
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) == report.bytes_after
    original, written = read_header(model / "model.safetensors"), read_header(tmp_path / "out" / "model.safetensors")
    norms = [n for n in written if n in original and written[n].spec.shape == (32,) and "bias" not in n]
    assert any(not torch.equal(written[n].read(), original[n].read()) for n in norms)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "mixtral"])
def test_a_rotated_checkpoint_with_its_own_head_is_close_to_the_original(saved, text, random_ids, tmp_path, name):
    model = saved(name)
    planned = run(model, tmp_path / "out", recipe(text, {"method": "rotate"}, rtn()))
    # A token between two experts may be routed to the other one when weights are rounded.
    limit = 0.1 if name == "mixtral" else 0.05
    assert off_by(logits(load(tmp_path / "out"), random_ids), logits(load(model), random_ids)) < limit
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) == planned.bytes_after


def test_a_tied_head_is_untied_by_a_rotation(tiny, text, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny)
    config["tie_word_embeddings"] = True
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tiny)
    assert "lm_head.weight" not in read_header(tiny / "model.safetensors")
    weights = ASYMMETRIC | {"group_size": 8}
    report = run(tiny, tmp_path / "out", recipe(text, {"method": "rotate"}, rtn(weights)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) == report.bytes_after
    ids = torch.arange(2, 10).repeat(2, 1)
    assert off_by(logits(load(tmp_path / "out"), ids), logits(load(tiny), ids)) < 0.05


@pytest.mark.parametrize(
    "inputs", [PER_TOKEN, PER_TOKEN | {"strategy": "tensor"}, STATIC], ids=["token", "tensor", "static"]
)
def test_w8a8_loads_here_and_in_plain_transformers(saved, text, random_ids, tmp_path, inputs):
    pytest.importorskip("compressed_tensors")
    model, random_ids = saved("llama"), random_ids % 8 + 2  # the letters that static scales were calibrated on
    run(model, tmp_path / "out", recipe(text, {"method": "smoothquant"}, rtn(PER_ROW, inputs=inputs)))
    ours = logits(load(tmp_path / "out"), random_ids)
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), random_ids)
    exact = logits(load(model), random_ids)
    assert 1e-6 < off_by(ours, exact) < 0.1
    # Static scales are stored; dynamic ones each runtime finds for itself (divisor 127 here, 127.5 there).
    assert off_by(ours, theirs) < (1e-4 if inputs is STATIC else 0.08)


def test_static_scales_are_the_calibrated_maximum_over_127(saved, text, tmp_path):
    model = saved("llama")
    run(model, tmp_path / "out", recipe(text, rtn(PER_ROW, inputs=STATIC)))
    tensors = read_header(tmp_path / "out" / "model.safetensors")
    scale = float(tensors["model.layers.0.self_attn.q_proj.input_scale"].read())
    assert scale == float(tensors["model.layers.0.self_attn.v_proj.input_scale"].read())
    from lmpress.calibrate.data.token_rows import calibration_rows
    from lmpress.compress.formats.tokenizer import load_tokenizer

    rows = calibration_rows(text, load_tokenizer(model), 8, 16, 0)
    original, seen = load(model), []
    original.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(original, rows.ids)
    assert scale == pytest.approx(float(seen[0].abs().max()) / 127, rel=1e-3)


def test_norms_are_stored_in_the_model_s_own_dtype(saved, text, random_ids, tmp_path):
    model = saved("llama", torch.bfloat16)
    run(model, tmp_path / "out", recipe(text, {"method": "smoothquant"}, rtn()))
    norm = read_header(tmp_path / "out" / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert norm.spec.dtype == "BF16"
    assert off_by(logits(load(tmp_path / "out"), random_ids), logits(load(model), random_ids)) < 0.05


@pytest.mark.parametrize("first", [{"method": "awq", "clip": False, "ratios": 2}, {"method": "rotate"}])
def test_an_interrupted_run_resumes_to_the_same_bytes(saved, text, tmp_path, monkeypatch, first):
    model = saved("llama", torch.bfloat16)
    chosen = recipe(text, first, {"method": "gptq", "scheme": {"weights": ASYMMETRIC | {"bits": 3}}})
    run(model, tmp_path / "whole", chosen)
    finish = workspace.Workspace.write

    def fail_at_the_second(self, index, *rest):
        if index == 1:
            raise StorageError("the disk is full")
        finish(self, index, *rest)

    monkeypatch.setattr(workspace.Workspace, "write", fail_at_the_second)
    with pytest.raises(StorageError):
        run(model, tmp_path / "out", chosen)
    monkeypatch.setattr(workspace.Workspace, "write", finish)
    run(model, tmp_path / "out", chosen)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert written[0] == written[1]


def test_layers_that_stay_dense_take_part_in_the_transform(saved, text, random_ids, tmp_path):
    model = saved("llama")
    chosen = recipe(text, {"method": "smoothquant"}, rtn(), keep=["*.k_proj", "*.v_proj", "*.down_proj"])
    run(model, tmp_path / "out", chosen)
    name = "model.layers.0.self_attn.k_proj.weight"
    before, after = (read_header(p / "model.safetensors")[name].read() for p in (model, tmp_path / "out"))
    assert not torch.equal(before, after)
    assert off_by(logits(load(tmp_path / "out"), random_ids), logits(load(model), random_ids)) < 0.05


def test_the_short_forms_of_methods():
    awq = quantization_recipe(method="awq")
    assert [p.method for p in awq.passes] == ["awq", "rtn"]
    assert (awq.scheme.weights.bits, awq.scheme.weights.symmetric, awq.scheme.inputs) == (4, False, None)
    smooth = quantization_recipe(method="smoothquant", options={"alpha": 0.8})
    assert smooth.passes[0].config.alpha == 0.8
    assert (smooth.scheme.weights.bits, smooth.scheme.weights.strategy, smooth.scheme.inputs.strategy) == (
        8,
        "channel",
        "token",
    )
    level = quantization_recipe(method="smoothquant", options={"level": "O3"}).scheme
    assert (level.weights.strategy, level.inputs.strategy, level.inputs.dynamic) == ("tensor", "tensor", False)
    assert quantization_recipe(method="rotate", bits=3, group_size=32).scheme.weights.group_size == 32
    assert default_out("x/model", awq).name == "model-awq-w4"
    assert default_out("x/model", smooth).name == "model-smoothquant-w8a8"


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([{"method": "awq"}], "awq alone stores nothing smaller"),
        ([rtn(), {"method": "awq"}, rtn()], "awq comes after rtn"),
        ([{"method": "rotate"}, {"method": "rotate"}, rtn()], "only one pass"),
        ([rtn(PER_ROW, inputs=PER_TOKEN | {"strategy": "channel"})], "inputs have no dynamic scales per channel"),
        ([rtn(PER_ROW, inputs=PER_TOKEN | {"dynamic": False})], "tokens are not known in advance"),
    ],
)
def test_invalid_recipes_are_refused(passes, message):
    with pytest.raises(UsageError, match=message):
        schema.build({"passes": passes})


ASYMMETRIC_INPUTS = PER_TOKEN | {"symmetric": False, "formula": "gptq"}
KINDS = {
    "w4a8": (ASYMMETRIC | {"bits": 4}, PER_TOKEN),
    "w4a8-static-asymmetric": (ASYMMETRIC | {"bits": 4}, ASYMMETRIC_INPUTS | {"strategy": "tensor", "dynamic": False}),
    "w8a8-asymmetric": (PER_ROW, ASYMMETRIC_INPUTS),
    "w8a8-static-asymmetric": (PER_ROW, ASYMMETRIC_INPUTS | {"strategy": "tensor", "dynamic": False}),
    "w8a6": (PER_ROW, PER_TOKEN | {"bits": 6}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_inputs_of_any_width_are_stored_and_served(saved, text, random_ids, tmp_path, kind):
    """The loaded model computes what the pipeline evaluated: dequantized weights, inputs rounded before every linear."""
    weights, inputs = KINDS[kind]
    report = run(saved("llama"), tmp_path / "out", recipe(text, rtn(weights, inputs=inputs)))
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) == report.bytes_after
    checkpoint, random_ids = Checkpoint.open(tmp_path / "out"), random_ids % 8 + 2
    found, dense = load(tmp_path / "out"), load(saved("llama"))
    layers = {name: checkpoint.layer(name) for name in checkpoint.layers}
    assert len(layers) == 14 and {layer.inputs for layer in layers.values()} == {QuantArgs(**inputs)}
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data.copy_(layer.dequantize())
    others = {n: t for n, t in found.named_parameters() if n in dict(dense.named_parameters())}
    dense.load_state_dict(others, strict=False)
    plain = logits(dense, random_ids)
    with quantized_inputs(dense, layers):
        expected = logits(dense, random_ids)
    quantized_logits = logits(found, random_ids)
    # A value halfway between two codes may fall to either side, which the rest of its row sees.
    rows = sorted(off_by(a, b) for a, b in zip(quantized_logits, expected, strict=True))
    assert rows[-2] < 1e-5 and rows[-1] < 1e-2 and rows[-2] < off_by(plain, expected)


def test_mixed_widths_with_quantized_inputs(saved, text, random_ids, tmp_path):
    """ZeroQuant's W4/8: feed-forward layers at 4 bits, attention at 8, inputs at 8."""
    pattern = {"*.self_attn.*": {"bits": 8, "strategy": "channel", "group_size": None, "formula": "signed"}}
    weights = ASYMMETRIC | {"bits": 4, "symmetric": True}
    run(saved("llama"), tmp_path / "out", recipe(text, rtn(weights, inputs=PER_TOKEN), overrides=pattern))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    bits = {name: args.bits for name, args in Checkpoint.open(tmp_path / "out").layers.items()}
    assert all(bits[name] == (8 if "self_attn" in name else 4) for name in bits) and len(bits) == 14
    assert off_by(logits(load(tmp_path / "out"), random_ids), logits(load(saved("llama")), random_ids)) < 0.3

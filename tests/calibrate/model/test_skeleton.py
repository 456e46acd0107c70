"""Skeletons filled from the checkpoint equal the models that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lmpress.calibrate.model import safetensors_io
from lmpress.calibrate.model.architecture import find_blocks
from lmpress.calibrate.model.skeleton import Names, build, materialise, outside, release
from lmpress.compress.formats.source import open_source
from lmpress.errors import CompressError, UsageError


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, rename: dict[str, str | None]) -> None:
    """Rename tensors of the checkpoint; None removes one."""
    tensors = safetensors_io.read(folder / "model.safetensors")
    renamed = {rename.get(name, name): tensor for name, tensor in tensors.items()}
    safetensors_io.write(folder / "model.safetensors", {name: tensor for name, tensor in renamed.items() if name})


def test_a_skeleton_holds_no_weights_but_real_buffers(tiny: Path) -> None:
    model = build(open_source(tiny))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert list(model.buffers()) and not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filled_skeleton_equals_the_model(tiny: Path, dtype: torch.dtype) -> None:
    source = open_source(tiny)
    model = build(source, dtype)
    materialise(model, "", source, Names(model, source), "cpu")
    expected = LlamaForCausalLM.from_pretrained(tiny, dtype=dtype).eval()
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_a_block_is_filled_and_released_alone(tiny: Path) -> None:
    source = open_source(tiny)
    model = build(source)
    materialise(model.get_submodule("model.layers.1"), "model.layers.1", source, Names(model, source), "cpu")
    filled = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert filled == {name for name in source.tensors if name.startswith("model.layers.1.")}
    release(model.get_submodule("model.layers.1"))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_names_with_or_without_the_base_models_prefix(tmp_path: Path) -> None:
    """GPT-2's published checkpoints lack the prefix `transformer.`; those of the tests have it."""
    config = GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    expected = GPT2LMHeadModel(config).eval()
    expected.save_pretrained(tmp_path)
    stored = safetensors_io.read(tmp_path / "model.safetensors")
    change_tensors(tmp_path, {name: name.removeprefix("transformer.") for name in stored})
    source = open_source(tmp_path)
    assert "wte.weight" in source.tensors
    model = build(source)
    materialise(model, "", source, Names(model, source), "cpu")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_tied_heads_are_found_under_the_embedding(tiny: Path) -> None:
    change_config(tiny, tie_word_embeddings=True)
    change_tensors(tiny, {"lm_head.weight": None})
    source = open_source(tiny)
    names = Names(build(source), source)
    assert names.find("lm_head.weight") == "model.embed_tokens.weight"
    assert names.ties("lm_head.weight") and not names.ties("model.embed_tokens.weight")


def test_untied_heads_must_be_there(tiny: Path) -> None:
    change_tensors(tiny, {"lm_head.weight": None})
    source = open_source(tiny)
    model = build(source)
    with pytest.raises(CompressError, match=r"holds no tensor for lm_head\.weight; the checkpoint is incomplete"):
        materialise(model, "", source, Names(model, source), "cpu")


def test_a_wrong_shape_is_named(tiny: Path) -> None:
    change_config(tiny, intermediate_size=32)
    source = open_source(tiny)
    model = build(source)
    with pytest.raises(CompressError, match=r"gate_proj\.weight has shape \(24, 16\) in the checkpoint, \(32, 16\)"):
        materialise(model, "", source, Names(model, source), "cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_with_nan_or_infinity_are_named(tiny: Path, value: float) -> None:
    tensors = safetensors_io.read(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    safetensors_io.write(tiny / "model.safetensors", tensors)
    source = open_source(tiny)
    model = build(source)
    with pytest.raises(CompressError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in .* NaN or infinite"):
        materialise(model, "", source, Names(model, source), "cpu")


def test_modules_outside_the_blocks(tiny: Path) -> None:
    model = build(open_source(tiny))
    names = {name for name, _ in outside(model, find_blocks(model)[1])}
    assert names == {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}


@pytest.mark.parametrize(
    "changes", [{"model_type": "nosuchmodel", "auto_map": {"AutoConfig": "evil.Config"}}, {"model_type": "resnet"}]
)
def test_unknown_architectures_are_refused(tiny: Path, changes: dict[str, object]) -> None:
    change_config(tiny, **changes)
    with pytest.raises(UsageError, match=r"config\.json does not describe a language model that transformers supports"):
        build(open_source(tiny))

"""GGUF files of Qwen2 and Qwen3: biases, norms of queries and keys, heads wider than their share, rows in their own order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import quantize
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lmpress
from lmpress.compress.formats.source import open_source
from lmpress.kernels.modules.linear import PackedLinear

IDS = torch.arange(16)[None]
SIZES = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "rope_theta": 500.0}
KINDS: dict[str, dict[str, Any]] = {"qwen2": {}, "qwen3": {"head_dim": 128}}  # the only one that transformers reads
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(params=[(kind, tied) for kind in KINDS for tied in (True, False)], ids=lambda p: f"{p[0]} {p[1]}")
def model(request: pytest.FixtureRequest, make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    kind, tied = request.param
    return make_model(kind, tie_word_embeddings=tied, **SIZES, **KINDS[kind])


def by_the_library(model: Any, file: Path, kind: str) -> Path:
    """A file written without lmpress: projections in blocks of `kind`, everything else unquantized."""
    config = model.config
    heads = config.num_attention_heads
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_value_length(getattr(config, "head_dim", None) or config.hidden_size // heads)

    def put(name: str, tensor: Tensor) -> None:
        numbers = tensor.detach().numpy()
        raw = gguf.GGMLQuantizationType[kind if ".ffn_" in name and numbers.ndim == 2 else "F32"]
        raw = gguf.GGMLQuantizationType[kind] if "attn_" in name and numbers.ndim == 2 else raw
        writer.add_tensor(name, numbers if raw.name == "F32" else quantize(numbers, raw), raw_dtype=raw)

    put("token_embd.weight", model.model.embed_tokens.weight)
    put("output_norm.weight", model.model.norm.weight)
    if not config.tie_word_embeddings:
        put("output.weight", model.lm_head.weight)
    for index, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            module, _, part = name.rpartition(".")
            put(f"blk.{index}.{PARTS[module]}.{part}", parameter)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def theirs(file: Path) -> Tensor:
    """The logits of transformers' own reader."""
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return loaded(IDS).logits


def test_unquantized_tensors_are_read_unchanged(model: PreTrainedModel, tmp_path: Path) -> None:
    file = by_the_library(model, tmp_path / "m.gguf", "F32")
    with torch.no_grad():
        assert torch.allclose(lmpress.load(file)(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)
    loaded, original = lmpress.load(file).state_dict(), model.state_dict()
    assert loaded.keys() == original.keys() and all(torch.equal(loaded[name], original[name]) for name in original)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_blocks_that_the_library_wrote_stay_packed(model: PreTrainedModel, tmp_path: Path, kind: str) -> None:
    file = by_the_library(model, tmp_path / "m.gguf", kind)
    read = lmpress.load(file)
    packed = [module for module in read.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 14
    assert torch.allclose(read(IDS).logits, theirs(file), rtol=0, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False], ids=["Q4_0", "Q4_1"])
def test_our_own_files_are_read_back(model: PreTrainedModel, tmp_path: Path, symmetric: bool) -> None:
    model.save_pretrained(tmp_path / "model")
    lmpress.quantize(tmp_path / "model", tmp_path / "q", method="rtn", group_size=32, symmetric=symmetric)
    file = lmpress.export(tmp_path / "q", tmp_path / "gguf", format="gguf").out / "model.gguf"
    read = lmpress.load(file)(IDS).logits
    expected = lmpress.load(tmp_path / "q")(IDS).logits
    assert torch.allclose(read, expected, rtol=0, atol=1e-4 if symmetric else 5e-2)
    assert torch.allclose(read, theirs(file), rtol=0, atol=1e-4)
    again = lmpress.export(file, tmp_path / "again", format="gguf").out / "model.gguf"
    assert open_source(again).tensors.keys() == open_source(file).tensors.keys()
    if symmetric:
        assert torch.equal(lmpress.load(again)(IDS).logits, read)

"""GGUF files of other tools: written here by the gguf library alone, and read as transformers reads them."""

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import quantize
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lmpress
from lmpress.compress.formats.gguf.header import check_header
from lmpress.compress.formats.tokenizer import load_tokenizer
from lmpress.errors import CompressError, UsageError
from lmpress.eval.inspect import inspect
from lmpress.kernels.modules.linear import PackedLinear

IDS = torch.arange(16)[None]
SAMPLE = Path(__file__).parents[4] / "examples" / "sample_model"
LAYERS = {
    **{
        f"self_attn.{ours}_proj": f"attn_{theirs}"
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
    },
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False, initializer_range=0.2)).eval()


def foreign(model: LlamaForCausalLM, file: Path, kinds: dict[str, str], **more: Any) -> Path:
    """A file by the library; `kinds` are the types of tensors by the end of their names, all others are float32."""
    config: Any = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(32)
    writer.add_vocab_size(32)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)

    def put(name: str, tensor: Tensor) -> None:
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "F32")
        numbers = tensor.detach().numpy()
        kind_of = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, numbers if kind == "F32" else quantize(numbers, kind_of), raw_dtype=kind_of)

    put("token_embd.weight", model.model.embed_tokens.weight)
    put("output_norm.weight", model.model.norm.weight)
    put("output.weight", model.lm_head.weight)
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in LAYERS.items():
            weight: Any = layer.get_submodule(ours).weight
            heads = {"attn_q": 4, "attn_k": 2}.get(theirs)
            if heads:  # rotary halves become pairs
                weight = weight.detach().view(heads, 2, 8, 64).transpose(1, 2).reshape(-1, 64).contiguous()
            put(f"blk.{index}.{theirs}.weight", weight)
        put(f"blk.{index}.attn_norm.weight", layer.input_layernorm.weight)
        put(f"blk.{index}.ffn_norm.weight", layer.post_attention_layernorm.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_unquantized_tensors_are_read_as_transformers_reads_them(
    llama: LlamaForCausalLM, tmp_path: Path, kind: str
) -> None:
    file = foreign(llama, tmp_path / "m.gguf", {"proj.weight": kind, "ffn_up.weight": kind, "attn_q.weight": kind})
    logits, expected = lmpress.load(file)(IDS).logits, llama(IDS).logits
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5 if kind == "F32" else 0.1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_stay_packed_and_serve_what_transformers_reads(
    llama: LlamaForCausalLM, tmp_path: Path, kind: str
) -> None:
    """Head and embedding are in blocks too: the head stays packed, the embedding is dequantized."""
    file = foreign(
        llama, tmp_path / "m.gguf", dict.fromkeys(("_q.weight", "_up.weight", "output.weight", "embd.weight"), kind)
    )
    model = lmpress.load(file)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert {"lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"} <= packed
    assert "model.layers.1.mlp.down_proj" not in packed
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert torch.allclose(model(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-4)
    dense = lmpress.export(file, tmp_path / "dense", format="fp32")
    assert torch.allclose(lmpress.load(dense.out)(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-4)


def test_symmetric_blocks_can_be_exported_to_other_formats(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = foreign(llama, tmp_path / "m.gguf", dict.fromkeys(("_q.weight", "_up.weight", "_down.weight"), "Q4_0"))
    out = lmpress.export(file, tmp_path / "packed", format="pack-quantized").out
    assert torch.allclose(lmpress.load(out)(IDS).logits, lmpress.load(file)(IDS).logits, rtol=0, atol=1e-5)


def test_a_file_that_is_read_and_exported_again_is_the_same(tmp_path: Path) -> None:
    """Export, read alone (no other file in the folder), export again: the same bytes, and the same tokens."""
    lmpress.quantize(SAMPLE, tmp_path / "q", method="rtn", group_size=32)
    first = lmpress.export(tmp_path / "q", tmp_path / "first", format="gguf").out / "model.gguf"
    alone = tmp_path / "alone" / "model.gguf"
    alone.parent.mkdir()
    alone.write_bytes(first.read_bytes())
    tokenizer, original = load_tokenizer(alone.parent), AutoTokenizer.from_pretrained(SAMPLE)
    text = "def f(x):\n    return  x + 1  # naïve\n"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.get_vocab() == original.get_vocab() and tokenizer.bos_token == original.bos_token
    second = lmpress.export(alone, tmp_path / "second", format="gguf")
    assert (second.out / "model.gguf").read_bytes() == first.read_bytes() and second.notes == ()
    assert inspect(alone).quantization == "gguf-blocks"


def test_a_sentencepiece_tokenizer_is_read_from_the_file_alone(tmp_path: Path, assets: Path) -> None:
    model = assets / "models" / "stories260K"
    lmpress.export(model, tmp_path / "gguf", format="gguf")
    alone = tmp_path / "alone.gguf"
    alone.write_bytes((tmp_path / "gguf" / "model.gguf").read_bytes())
    text = "  Once upon a time,  there was a girl named Zoë. "
    assert load_tokenizer(alone)(text)["input_ids"] == AutoTokenizer.from_pretrained(model)(text)["input_ids"]


def test_what_is_not_read_is_refused_by_name(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = foreign(llama, tmp_path / "m.gguf", {}, llama__rope__scaling__type="yarn")
    with pytest.raises(UsageError, match="scaled rotary embeddings"):
        lmpress.load(file)
    with pytest.raises(CompressError, match=r"m\.gguf cannot be read \(its metadata hold no tokens\)"):
        load_tokenizer(file)
    foreign(llama, tmp_path / "n.gguf", {})
    with pytest.raises(UsageError, match="holds 2 GGUF files; give one of them"):
        lmpress.load(tmp_path)
    rare = llama.model.layers[0].mlp.up_proj.weight
    llama.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(96, 256))
    foreign(llama, tmp_path / "o.gguf", {"0.ffn_up.weight": "TQ1_0"})
    llama.model.layers[0].mlp.up_proj.weight = rare
    with pytest.raises(UsageError, match=r"ffn_up\.weight is stored as TQ1_0; lmpress reads F32"):
        lmpress.load(tmp_path / "o.gguf")
    whole = (tmp_path / "n.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CompressError, match="is not a complete GGUF file"):
        lmpress.load(tmp_path / "cut.gguf")
    (tmp_path / "not.gguf").write_bytes(b"no such thing")
    with pytest.raises(CompressError, match="is not a complete GGUF file"):
        lmpress.load(tmp_path / "not.gguf")


def damaged(file: Path, key: str, code: str, value: int) -> None:
    """Write `value`, packed by struct's `code`, over the value of the entry `key`."""
    data = file.read_bytes()
    place = data.index(key.encode()) + len(key) + 4
    new = struct.pack(f"<{code}", value)
    file.write_bytes(data[:place] + new + data[place + len(new) :])


@pytest.mark.parametrize(
    ("key", "code", "value", "message"),
    [
        ("llama.block_count", "I", 2**32 - 1, "block_count is 4294967295, and there are 21 tensors"),
        ("llama.attention.head_count", "I", 0, "attention.head_count must be a whole number of at least 1, got 0"),
        ("llama.attention.head_count_kv", "I", 0, "head_count_kv must be a whole number of at least 1, got 0"),
        ("llama.feed_forward_length", "I", 2**31, "intermediate_size is 2147483648, and the weight files"),
        ("llama.context_length", "I", 0, "context_length must be"),
        ("general.architecture", "Q", 2**62, "is not a complete GGUF file"),
    ],
)
def test_numbers_of_the_metadata_are_checked(
    llama: LlamaForCausalLM, tmp_path: Path, key: str, code: str, value: int, message: str
) -> None:
    file = foreign(llama, tmp_path / "m.gguf", {})
    damaged(file, key, code, value)
    with pytest.raises(CompressError, match=message):
        lmpress.load(file)


@pytest.mark.parametrize("place", [8, 16])  # of the numbers of tensors and of entries
def test_counts_beyond_the_file_are_refused_at_once(llama: LlamaForCausalLM, tmp_path: Path, place: int) -> None:
    file = foreign(llama, tmp_path / "m.gguf", {})
    data = file.read_bytes()
    file.write_bytes(data[:place] + struct.pack("<Q", 2**62) + data[place + 8 :])
    with pytest.raises(ValueError, match=r"states|cut off|dimensions|a value of type"):
        check_header(file)


def test_the_count_of_an_array_is_compared_with_the_file(tmp_path: Path) -> None:
    for order, version in (("<", 3), (">", 3)):
        entry = struct.pack(f"{order}Q1sIIQ", 1, b"a", 9, 4, 2**40) + bytes(64)
        head = struct.pack(f"{order}IQQ", version, 0, 1)
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + head + entry)
        with pytest.raises(ValueError, match=r"states 4,398,046,511,104 bytes"):
            check_header(tmp_path / "m.gguf")


def test_headers_by_the_library_pass(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    check_header(foreign(llama, tmp_path / "m.gguf", {}, general__note="a"))

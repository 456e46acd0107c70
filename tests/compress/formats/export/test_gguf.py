"""GGUF blocks against the gguf library's own reading, and whole files against transformers' reader."""

from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lmpress
from lmpress.compress.formats.gguf import blocks
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.errors import UsageError
from lmpress.recipes.scheme import QuantArgs

IDS = torch.randint(0, 10, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "kind"),
    [
        (2, True, 32, "Q4_0"),
        (3, True, 64, "Q4_0"),
        (4, True, 32, "Q4_0"),
        (4, True, None, "Q4_0"),
        (5, True, 32, "Q5_0"),
        (6, True, 32, "Q8_0"),
        (8, True, 64, "Q8_0"),
        (3, False, 32, "Q4_1"),
        (4, False, 64, "Q4_1"),
        (5, False, 32, "Q5_1"),
    ],
)
def test_blocks_are_what_the_library_reads(bits: int, symmetric: bool, group: int | None, kind: str) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(bits))
    args = QuantArgs(bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group)
    tensor = round_to_nearest(weight, args)
    assert blocks.kind(args, 128) == kind
    packed = blocks.pack("P", tensor)
    assert packed.shape == (6, blocks.bytes_per_row(kind, 128))
    read = torch.from_numpy(dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind]))
    if symmetric:
        assert blocks.rounding(kind, args) is None and torch.equal(read, tensor.dequantize())
    else:  # d c + m with m = float16(-zero d), which differs from -zero d by half a unit in the last place
        minimum = (-tensor.zero.float() * tensor.scale.float()).repeat_interleave(128 // tensor.zero.shape[1], 1)
        expected = tensor.dequantize() + (minimum.half().float() - minimum)
        assert torch.allclose(read, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "args",
    [QuantArgs(group_size=16), QuantArgs(bits=8, symmetric=False, group_size=32), QuantArgs(scale_dtype="float32")],
    ids=["small groups", "8 bits asymmetric", "float32 scales"],
)
def test_grids_that_no_block_holds_become_float16_which_is_reported(args: QuantArgs) -> None:
    assert blocks.kind(args, 128) == "F16" and "rounded" in blocks.rounding("F16", args)
    tensor = round_to_nearest(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)), args)
    read = blocks.pack("P", tensor).view(torch.float16).float()
    assert torch.equal(read, tensor.dequantize().half().float())


SIZES = {
    "vocab_size": 10,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=128)),
}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_architectures_are_read_by_transformers(tmp_path: Path, kind: str) -> None:
    """Without rotary permutation, with biases or norms of queries. (transformers takes every head of Qwen3 for 128 wide.)"""
    build, config = MODELS[kind]
    torch.manual_seed(0)
    model = build(config).eval()
    for name, parameter in model.named_parameters():  # biases are born zero: no mistake would show
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "model")
    lmpress.quantize(tmp_path / "model", tmp_path / "out", method="rtn", group_size=32)
    report = lmpress.export(tmp_path / "out", tmp_path / "gguf", format="gguf")
    assert report.notes == ("no tokenizer in the file: the checkpoint has none",)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(read(IDS).logits, lmpress.load(tmp_path / "out")(IDS).logits, rtol=0, atol=1e-5)


def test_the_sample_model_and_its_tokenizer_are_read_by_transformers(tmp_path: Path) -> None:
    sample = Path(__file__).parents[4] / "examples" / "sample_model"
    lmpress.quantize(sample, tmp_path / "out", method="rtn", group_size=64)
    report = lmpress.export(tmp_path / "out", tmp_path / "gguf", format="gguf")
    assert report.notes == ()
    read = AutoModelForCausalLM.from_pretrained(report.out, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(32)[None]
    assert torch.allclose(read(ids).logits, lmpress.load(tmp_path / "out")(ids).logits, rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(report.out, gguf_file="model.gguf")
    text = "def f(x):\n    return  x + 1  # naïve\n"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(sample)(text)["input_ids"]


def test_a_sentencepiece_tokenizer_is_read_by_transformers(tmp_path: Path, assets: Path) -> None:
    model = assets / "models" / "stories260K"
    lmpress.quantize(model, tmp_path / "out", method="rtn", group_size=32)
    report = lmpress.export(tmp_path / "out", tmp_path / "gguf", format="gguf")
    assert len(report.notes) == 1 and "5 layers, such as model.layers.0.mlp.down_proj" in report.notes[0]
    tokenizer = AutoTokenizer.from_pretrained(report.out, gguf_file="model.gguf")
    text = "Once upon a time,  there was a girl named Zoë."
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(model)(text)["input_ids"]


def test_an_architecture_that_gguf_export_does_not_know_is_refused(tmp_path: Path, assets: Path) -> None:
    with pytest.raises(UsageError, match=r"does not know models of type gpt2; it writes llama"):
        lmpress.export(assets / "models" / "babygpt-shakespeare-gpt2", tmp_path / "gguf", format="gguf")
    assert not any(tmp_path.iterdir())


def test_biases_are_permuted_with_the_rows(tmp_path: Path) -> None:
    """transformers' reader drops the biases of a Llama, so the file itself is read."""
    build, config = MODELS["llama"]
    model = build(config)
    bias = torch.arange(64.0)
    model.model.layers[0].self_attn.q_proj.bias.data.copy_(bias)
    model.save_pretrained(tmp_path / "model")
    lmpress.export(tmp_path / "model", tmp_path / "gguf", format="gguf")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    halves = bias.view(4, 2, 8)
    expected = torch.stack([halves[:, 0], halves[:, 1]], dim=2).flatten()
    assert torch.equal(torch.from_numpy(tensors["blk.0.attn_q.bias"].copy()), expected)
    assert "output.weight" not in tensors

"""Packed embeddings and heads: planned to the byte, served as their dequantized rows, also tied, also by other loaders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lmpress
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.run import Run
from lmpress.errors import UsageError
from lmpress.recipes import schema
from lmpress.recipes.scheme import QuantArgs

WEIGHTS = {"bits": 4, "symmetric": True, "strategy": "group", "group_size": 8}


IDS = torch.randint(2, 10, (3, 16), generator=torch.Generator().manual_seed(0))
NF4 = {"formula": "nf4", "strategy": "flat", "group_size": 64, "scale_dtype": "float32"}


def recipe(**embedding: Any) -> schema.Recipe:
    passes = [{"method": "rtn", "scheme": {"weights": WEIGHTS}}]
    return schema.build({"passes": passes, "embedding": WEIGHTS | embedding})


def saved(folder: Path, tiny: Path, tied: bool) -> Path:
    model = LlamaForCausalLM.from_pretrained(tiny)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    return folder


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tables_are_served_as_their_rounded_rows(
    tiny: Path, tmp_path: Path, tied: bool, symmetric: bool, bits: int
) -> None:
    model = saved(tmp_path / "model", tiny, tied)
    wanted = recipe(bits=bits, symmetric=symmetric)
    planned = Run.of(model, wanted).plan
    report = lmpress.run(model, tmp_path / "out", wanted)
    assert planned.bytes_after == report.bytes_after == (tmp_path / "out/model.safetensors").stat().st_size
    reference = LlamaForCausalLM.from_pretrained(model).eval()
    args = QuantArgs(**(WEIGHTS | {"bits": bits, "symmetric": symmetric}))
    with torch.no_grad():
        for name, layer in reference.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                layer.weight.copy_(round_to_nearest(layer.weight, QuantArgs(**WEIGHTS)).dequantize())
        for table in {reference.model.embed_tokens.weight, reference.lm_head.weight}:
            table.copy_(round_to_nearest(table, args).dequantize())
    served = lmpress.load(tmp_path / "out")
    assert sorted(name for name, _ in served.named_parameters() if "norm" not in name) == []
    with torch.no_grad():
        torch.testing.assert_close(served(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)
        half = served.half()(IDS).logits
    assert half.dtype == torch.float16 and (half - reference(IDS).logits).abs().max() < 0.2
    lmpress.export(tmp_path / "out", tmp_path / "dense", format="fp32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in dense.named_parameters())
    assert dense.config.tie_word_embeddings == tied


def test_other_runtimes_read_the_table_from_gguf_and_onnx(tmp_path: Path, letters: Any) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("onnxruntime")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=10, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    letters.save_pretrained(tmp_path / "model")
    lmpress.run(tmp_path / "model", tmp_path / "out", recipe(bits=5, group_size=32))
    lmpress.export(tmp_path / "out", tmp_path / "gguf", format="gguf")
    found = lmpress.verify(tmp_path / "gguf", against=tmp_path / "out", runtime=["gguf-transformers"])
    assert found.ok, found
    lmpress.export(tmp_path / "out", tmp_path / "onnx", format="onnx")
    found = lmpress.verify(tmp_path / "onnx", against=tmp_path / "out", runtime=["onnxruntime"])
    assert found.ok, found
    lmpress.export(tmp_path / "out", tmp_path / "again", format="pack-quantized")
    assert torch.equal(lmpress.load(tmp_path / "again")(IDS).logits, lmpress.load(tmp_path / "out")(IDS).logits)
    with pytest.raises(UsageError, match="embed_tokens cannot be exported: gptq cannot read a packed embedding"):
        lmpress.export(tmp_path / "out", tmp_path / "gptq", format="gptq")
    with pytest.raises(UsageError, match=r"transformers cannot serve model\.embed_tokens"):
        lmpress.run(tmp_path / "model", tmp_path / "no", recipe(bits=8, group_size=32), target=["transformers"])
    with pytest.raises(AttributeError):  # an error, not random weights
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_config_names_tables_and_all_linears(tiny: Path, tmp_path: Path) -> None:
    lmpress.run(saved(tmp_path / "model", tiny, tied=False), tmp_path / "out", recipe())
    content = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert content["config_groups"]["group_outside"]["targets"] == ["model.embed_tokens", "lm_head"]
    assert content["ignore"] == []
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.tied_head is None and checkpoint.layers["lm_head"] == checkpoint.layers["model.embed_tokens"]


def test_a_group_that_does_not_fit_is_reported(tiny: Path) -> None:
    notes = Run.of(tiny, recipe(group_size=128)).plan.notes
    assert notes == ["group size 128 does not divide 16: one scale per row is used: model.embed_tokens, lm_head"]


@pytest.mark.parametrize(
    ("passes", "embedding", "words"),
    [
        ([{"method": "rtn"}], {"strategy": "tensor", "group_size": None}, "groups or rows of integers"),
        (
            [{"method": "rtn"}],
            {"formula": "nf4", "strategy": "flat", "group_size": 64, "scale_dtype": "float32"},
            "groups or rows of integers",
        ),
        ([{"method": "nf4"}], {}, "only packed with"),
        ([{"method": "rotate"}, {"method": "rtn"}], {}, "transforms the whole model"),
    ],
)
def test_unsupported_embeddings_are_refused(
    tiny: Path, passes: list[dict[str, Any]], embedding: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Run.of(tiny, schema.build({"passes": passes, "embedding": WEIGHTS | embedding}))


def test_scaled_embeddings_are_refused(tmp_path: Path, make_model: Any) -> None:
    make_model("gemma3").save_pretrained(tmp_path / "gemma")
    with pytest.raises(UsageError, match="not a plain table"):
        Run.of(tmp_path / "gemma", recipe())

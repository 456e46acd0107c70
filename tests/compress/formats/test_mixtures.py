"""Mixtures of experts as others store them: names of the original model, routers left alone, one pattern for all experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lmpress
from lmpress.compress.formats.source import open_source
from lmpress.compress.plan import LayerPlan
from lmpress.compress.run import Run
from lmpress.compress.runtime_support import check
from lmpress.errors import UsageError
from lmpress.eval.verify import verify
from lmpress.recipes.schema import parse
from lmpress.recipes.scheme import QuantArgs

COMMON = {
    "vocab_size": 31,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 3,  # all of them: a rounding in float16 cannot choose another
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": {"num_experts": 3},
}
IDS = torch.arange(3, 19).unsqueeze(0)
ROUTERS = {
    "mixtral": ("block_sparse_moe.gate",),
    "qwen2_moe": ("mlp.gate", "mlp.shared_expert_gate"),
    "qwen3_moe": ("mlp.gate",),
    "olmoe": ("mlp.gate",),
}
MIXED = "passes: [{method: rtn, scheme: {weights: {group_size: 16}}}]\noverrides: {'*.self_attn.*': {bits: 8}}\n"


def saved(folder: Path, kind: str) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(COMMON | KINDS[kind]))
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / kind)
    return folder / kind


@pytest.fixture(params=KINDS)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    lmpress.quantize(saved(tmp_path, request.param), tmp_path / "q", method="rtn", group_size=16)
    return request.param, tmp_path / "q"


def test_layers_keep_the_names_of_the_original(packed: tuple[str, Path]) -> None:
    kind, out = packed
    before, after = (open_source(folder) for folder in (out.parent / kind, out))
    layers = {name.removesuffix("_packed") for name in after.tensors if name.endswith(".weight_packed")}
    assert layers <= set(before.tensors)
    assert {name for name in before.tensors if ".experts." in name} <= layers
    dense = {name for name in after.tensors if not name.rpartition(".")[2].startswith("weight_")}
    assert dense | layers == set(before.tensors)
    ignored = set(after.config["quantization_config"]["ignore"])
    assert ignored == {"lm_head", *(f"model.layers.{i}.{router}" for i in range(2) for router in ROUTERS[kind])}


def test_transformers_serves_them(packed: tuple[str, Path]) -> None:
    """It merges the experts of a layer in float16: no code may be another, half a unit in the last place may be lost."""
    pytest.importorskip("compressed_tensors")
    ours, theirs = verify(packed[1], runtime=["lmpress", "transformers"]).findings
    assert ours.ok and ours.steps == 0 and theirs.ok, theirs
    assert theirs.steps is not None and theirs.steps <= 2**-8
    assert theirs.outputs is not None and theirs.outputs.logits < 1e-2


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_of_another_grid_than_attention(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("compressed_tensors")
    (tmp_path / "recipe.yaml").write_text(MIXED)
    lmpress.run(saved(tmp_path, kind), tmp_path / "q", tmp_path / "recipe.yaml")
    groups = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]["config_groups"].values()
    (experts,) = (group for group in groups if group["weights"]["num_bits"] == 4)
    assert experts["targets"] == [r"re:.*\.experts\.\d+\..*"]
    ours, theirs = verify(tmp_path / "q", runtime=["lmpress", "transformers"]).findings
    assert ours.ok and theirs.ok, theirs


@pytest.mark.parametrize("name", ["pack-quantized", "gptq_v2", "awq"])
def test_exports_are_read_back(tmp_path: Path, name: str) -> None:
    source = tmp_path / "q"
    lmpress.quantize(saved(tmp_path, "mixtral"), source, method="rtn", group_size=32)
    out = lmpress.export(source, tmp_path / "out", format=name).out
    assert any("block_sparse_moe.experts.2.w3." in tensor for tensor in open_source(out).tensors)
    assert torch.equal(lmpress.load(out)(IDS).logits, lmpress.load(source)(IDS).logits)


def layers(**args: QuantArgs | None) -> list[LayerPlan]:
    names = {
        "attention": "m.0.self_attn.q_proj",
        "one": "m.0.mlp.experts.0.up_proj",
        "two": "m.0.mlp.experts.1.up_proj",
    }
    return [LayerPlan(names[key], 0, "Linear", (128, 128), each, 0) for key, each in args.items()]


FOUR, EIGHT = QuantArgs(group_size=32), QuantArgs(bits=8, group_size=32)


@pytest.mark.parametrize(
    ("target", "found", "message"),
    [
        ("gptqmodel", layers(attention=FOUR, one=FOUR), r"experts.0.up_proj as gptq: it is an expert"),
        ("onnxruntime", layers(one=FOUR), "it is an expert of a mixture; export to fp16"),
        ("transformers", layers(one=FOUR, two=EIGHT), "one setting for all experts"),
        ("transformers", layers(attention=FOUR, one=FOUR, two=None), "experts that stay dense among packed layers"),
    ],
)
def test_targets_refuse_other_mixtures(target: str, found: list[LayerPlan], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(found, [target])


def test_targets_take_mixtures_that_they_read(tmp_path: Path) -> None:
    Run.of(
        saved(tmp_path, "mixtral"),
        parse(MIXED.replace("16", "32"), "recipe"),
        targets=["transformers", "vllm", "lmpress"],
    )
    check(layers(attention=EIGHT, one=FOUR, two=FOUR), ["transformers", "sglang"])

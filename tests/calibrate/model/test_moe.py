"""Mixtures of experts split into linear layers: the same function, with the tensor names of the checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import lmpress
from lmpress.calibrate.model.architecture import find_linears
from lmpress.calibrate.model.moe import SplitExperts
from lmpress.calibrate.model.skeleton import Names, build, materialise
from lmpress.compress.formats.source import open_source

COMMON = {
    "vocab_size": 10,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = [
    MixtralConfig(**COMMON, num_local_experts=4),
    Qwen2MoeConfig(**COMMON, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    Qwen3MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=24, head_dim=8),
    OlmoeConfig(**COMMON, num_experts=5),
]


def saved(config: PreTrainedConfig, folder: Path, letters: PreTrainedTokenizerFast) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    letters.save_pretrained(folder)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_split_experts_compute_the_same(
    config: PreTrainedConfig, tmp_path: Path, letters: PreTrainedTokenizerFast
) -> None:
    model = saved(config, tmp_path, letters)
    source = open_source(tmp_path)
    ours = build(source)
    materialise(ours, "", source, Names(ours, source), "cpu")
    assert sum(isinstance(module, SplitExperts) for module in ours.modules()) == 2
    ids = torch.randint(0, 10, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, model(ids).logits, atol=1e-5)


def test_routers_are_not_compressed(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    saved(CONFIGS[1], tmp_path, letters)
    names = find_linears(build(open_source(tmp_path)).model.layers[0])
    assert "mlp.experts.5.down_proj" in names
    assert "mlp.shared_expert.up_proj" in names
    assert not any(name.endswith("gate") for name in names)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_mixture_is_compressed(method: str, tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    saved(CONFIGS[0], tmp_path / "moe", letters)
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 40)
    report = lmpress.quantize(
        tmp_path / "moe", tmp_path / "out", method=method, group_size=8, calib=str(text), samples=4, seq_len=16
    )
    assert report.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size
    found = lmpress.evaluate(tmp_path / "out", str(text), seq_len=16, against=tmp_path / "moe")
    assert found.kl is not None
    assert found.kl < 0.5


def test_an_expert_that_no_token_reaches_is_rounded_and_named(tmp_path: Path, letters: PreTrainedTokenizerFast) -> None:
    model = saved(CONFIGS[0], tmp_path / "moe", letters)
    router = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():  # experts 2 and 3 get the same score and less than both others, whatever the token's sign
        router.zero_()
        router[0, 0], router[1, 0] = 50.0, 50.0
        model.model.embed_tokens.weight[:, 0] = 20.0  # channel 0 stays positive through attention
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.save_pretrained(tmp_path / "moe")
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 40)
    report = lmpress.quantize(
        tmp_path / "moe", tmp_path / "out", quality="fast", group_size=8, calib=str(text), samples=4, seq_len=16
    )
    tokens = {str(layer["name"]): layer["tokens"] for layer in report.layers}
    assert tokens["model.layers.0.mlp.experts.0.up_proj"] == 4 * 16
    assert tokens["model.layers.0.mlp.experts.3.up_proj"] == 0
    assert report.verdict.word == "SUSPECT"
    assert "no calibration token reached" in report.verdict.reason
    rounded = lmpress.quantize(tmp_path / "moe", tmp_path / "rtn", method="rtn", group_size=8)
    assert rounded.bytes_after == report.bytes_after
    starved = "model.layers.0.mlp.experts.3.up_proj"
    one, other = (lmpress.load(tmp_path / name).get_submodule(starved) for name in ("out", "rtn"))
    assert torch.equal(one.compressed.codes, other.compressed.codes)

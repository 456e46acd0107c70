"""Dropped layers: the student's layers are the teacher's bit for bit, on many families, and generation is correct."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmpress.calibrate.model.architecture import find_blocks
from lmpress.compress.structured.drop_layers import keep_layers
from lmpress.errors import UsageError

LAYERS = 6
BASE: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
SLIDING = {"sliding_window": 4, "use_sliding_window": True}
MIXED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", SLIDING | {"max_window_layers": 3}),
    "qwen3": ("qwen3", SLIDING | {"layer_types": MIXED}),
    "gemma2": ("gemma2", SLIDING),
    "gemma3": ("gemma3_text", SLIDING | {"layer_types": MIXED}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 3]], "window_size": 4},
    ),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {"n_layer": LAYERS, "n_head": 4}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0] * 2}),
    "cohere2": ("cohere2", SLIDING | {"layer_types": MIXED}),
    "mixtral": ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen3_moe": (
        "qwen3_moe",
        {"mlp_only_layers": [1, 4], "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"] * 2}),
    "qwen3_next": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
}
KEPT = [0, 2, 3, 4]


def saved(family: str, folder: Path) -> Path:
    kind, shape = FAMILIES[family]
    own = {key: value for key, value in BASE.items() if kind not in ("gpt2", "bloom", "gpt_neo") or "num_" not in key}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(own | shape)), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def attributes(block: torch.nn.Module, name: str) -> list[object]:
    return [getattr(module, name) for module in block.modules() if hasattr(module, name)]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_teachers_and_are_renumbered(family: str, tmp_path: Path, loaded) -> None:
    folder = saved(family, tmp_path / "teacher")
    keep_layers(folder, tmp_path / "student", KEPT)
    teacher, student = loaded(folder), loaded(tmp_path / "student")
    blocks = find_blocks(student)[1]
    assert student.config.num_hidden_layers == len(blocks) == len(KEPT)
    for new, old in enumerate(KEPT):
        theirs = find_blocks(teacher)[1][old].state_dict()
        ours = blocks[new].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert set(attributes(blocks[new], "layer_idx")) <= {new, None}
        for name in ("sliding_window", "is_sliding", "use_rope", "layer_type", "attention_type"):
            assert attributes(blocks[new], name) == attributes(find_blocks(teacher)[1][old], name)
    outside = {n: p for n, p in student.named_parameters() if not n.startswith(find_blocks(student)[0])}
    assert all(torch.equal(p, teacher.get_parameter(n)) for n, p in outside.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_the_same_with_and_without_cache(family: str, tmp_path: Path, loaded) -> None:
    keep_layers(saved(family, tmp_path / "teacher"), tmp_path / "student", KEPT)
    student = loaded(tmp_path / "student")
    prompt = torch.tensor([[1, 5, 9, 3, 7, 4]])
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with_cache = student.generate(prompt, use_cache=True, **options)
    assert torch.equal(with_cache, student.generate(prompt, use_cache=False, **options))


def test_the_function_is_that_of_the_remaining_layers(tmp_path: Path, loaded) -> None:
    folder = saved("qwen3", tmp_path / "teacher")
    keep_layers(folder, tmp_path / "student", KEPT)
    teacher, student = loaded(folder), loaded(tmp_path / "student")
    ids = torch.randint(3, 31, (2, 12), generator=torch.Generator().manual_seed(0))
    teacher.model.layers = torch.nn.ModuleList(teacher.model.layers[i] for i in KEPT)
    teacher.config.num_hidden_layers = len(KEPT)
    teacher.config.layer_types = [MIXED[i] for i in KEPT]
    with torch.no_grad():
        assert torch.equal(teacher(ids, use_cache=False).logits, student(ids, use_cache=False).logits)


@pytest.mark.parametrize("kept", [[], [2, 1], [0, 0, 1], [-1, 2], [0, LAYERS]], ids=str)
def test_impossible_layers_are_refused(kept: list[int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be kept"):
        keep_layers(saved("llama", tmp_path / "teacher"), tmp_path / "student", kept)
    assert not (tmp_path / "student").exists()


def test_a_selection_that_the_config_cannot_express_is_refused(tmp_path: Path) -> None:
    """Jamba's config gives attention layers by a period: only whole periods can be removed."""
    FAMILIES["jamba"] = (
        "jamba",
        {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 50, "expert_layer_offset": 49}
        | {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2},
    )
    folder = saved("jamba", tmp_path / "teacher")
    with pytest.raises(UsageError, match="layer 2 cannot become layer 1"):
        keep_layers(folder, tmp_path / "student", [0, 2, 3, 4])
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    keep_layers(folder, tmp_path / "student", [0, 1, 2])
    assert json.loads((tmp_path / "student/config.json").read_text())["num_hidden_layers"] == 3


def test_models_that_compute_with_layer_numbers_are_refused(tmp_path: Path) -> None:
    FAMILIES["numbered"] = ("gpt2", FAMILIES["gpt2"][1] | {"scale_attn_by_inverse_layer_idx": True})
    with pytest.raises(UsageError, match="number of a layer"):
        keep_layers(saved("numbered", tmp_path / "teacher"), tmp_path / "student", KEPT)

"""Every writer on fused projections, `Conv1D`, experts, biases, heads: the same outputs, or a refusal with a reason."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lmpress
from lmpress.compress import export
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.errors import CompressError

WIDE = {"hidden_size": 64, "intermediate_size": 96}
CONV1D = {"n_embd": 64, "n_inner": 96}
# Architecture, what its config changes, and what it is here for.
MODELS = {
    "tied head": ("llama", WIDE | {"head_dim": 16, "tie_word_embeddings": True}),
    "untied head": ("llama", WIDE | {"head_dim": 16, "tie_word_embeddings": False}),
    "biases": ("qwen2", WIDE),
    "qkv and gate_up in one": ("phi3", WIDE),
    "query_key_value in one, biases": ("gpt_neox", WIDE),
    "experts, stored one by one": ("mixtral", WIDE | {"head_dim": 16}),
    "Conv1D": ("gpt2", CONV1D),
}
EIGHT_BIT_ROWS = {"bits": 8, "group_size": -1}
FOREIGN = {  # reason of a refusal, by the format and the case; every other pair computes the same
    ("gguf", "qkv and gate_up in one"): "does not know models of type phi3",
    ("gguf", "query_key_value in one, biases"): "does not know models of type gpt_neox",
    ("gguf", "experts, stored one by one"): "does not know models of type mixtral",
    ("gguf", "Conv1D"): "does not know models of type gpt2",
    **{(name, c): "does not know models of type" for name in ("onnx", "openvino") for c in MODELS if "head" not in c},
    **{
        (name, "Conv1D"): "readers serve plain linear layers, this is a Conv1D"
        for name in ("pack-quantized", "gptq", "gptq_v2", "awq", "bitsandbytes")
    },
}
IDS = torch.randint(3, 31, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(path: Path) -> Tensor:
    with torch.inference_mode():
        return lmpress.load(path)(IDS).logits


@pytest.mark.parametrize("case", MODELS)
def test_what_is_exported_computes_the_same_or_is_refused(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], case: str
) -> None:
    architecture, changes = MODELS[case]
    make_model(architecture, **changes).save_pretrained(tmp_path / "model")
    lmpress.quantize(tmp_path / "model", tmp_path / "q4", method="rtn", group_size=32)
    lmpress.quantize(tmp_path / "model", tmp_path / "q8", method="rtn", **EIGHT_BIT_ROWS)
    assert len(Checkpoint.open(tmp_path / "q4").layers) >= 8
    expected = {name: logits(tmp_path / name) for name in ("q4", "q8")}
    known = [name for name in export.formats() if name != "openvino" or importlib.util.find_spec("openvino")]
    for name in known:
        source, out = "q8" if name == "bitsandbytes" else "q4", tmp_path / name
        if (name, case) in FOREIGN:
            with pytest.raises(CompressError, match=FOREIGN[name, case]):
                lmpress.export(tmp_path / source, out, format=name)
            assert not out.exists()
            continue
        lmpress.export(tmp_path / source, out, format=name)
        if name in export.WHOLE_FILES:  # their own tests read them with the runtimes
            continue
        tolerance = {"fp16": 2e-2, "bf16": 2e-1}.get(name, 1e-5) * float(expected[source].std())
        assert torch.allclose(logits(out), expected[source], rtol=0, atol=tolerance), name


def test_experts_that_stay_fused_are_copied_unchanged(tmp_path: Path) -> None:
    """Transposed experts with biases in three dimensions have no place for packed weights: they stay dense, and so does an
    export; the attention in the same block is packed."""
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = {
        "vocab_size": 31,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = GptOssConfig(
        **WIDE, **shape, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32, sliding_window=8
    )
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(tmp_path / "model")
    lmpress.quantize(tmp_path / "model", tmp_path / "q", method="rtn", group_size=32, keep=["*.router"])
    fused = [name for name in Checkpoint.open(tmp_path / "q").source.tensors if name.endswith("experts.gate_up_proj")]
    assert len(fused) == 2
    for name in ("gptq", "awq", "pack-quantized"):
        lmpress.export(tmp_path / "q", tmp_path / name, format=name)
        assert torch.equal(logits(tmp_path / name), logits(tmp_path / "q"))
        source = Checkpoint.open(tmp_path / name).source
        assert torch.equal(source.read(fused[0]), Checkpoint.open(tmp_path / "model").source.read(fused[0]))


def test_pruned_experts_are_read_by_transformers_too(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    """Dense experts are stored under the names that transformers merges."""
    make_model("mixtral").save_pretrained(tmp_path / "model")
    report = lmpress.prune(tmp_path / "model", tmp_path / "out", method="magnitude", keep=["*.down_proj"])
    assert report.bytes_after == sum(file.stat().st_size for file in report.out.glob("*.safetensors"))
    pruned = lmpress.load(tmp_path / "out").state_dict()
    original = lmpress.load(tmp_path / "model").state_dict()
    for name in (n for n in original if "experts" in n):
        kept = pruned[name] != 0
        assert torch.equal(pruned[name][kept], original[name][kept])
        assert abs(float(kept.float().mean()) - (1 if "down_proj" in name else 0.5)) < 0.02

"""llama.cpp itself serves our files: weights equal bit for bit, logits as near as its 8-bit inputs allow."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.errors import UsageError
from lmpress.eval.engines import llamacpp

SAMPLE = Path(__file__).parents[3] / "examples" / "sample_model"
SUPER = {"formula": "ggml", "scale_dtype": "super"}
GRIDS: dict[str, dict[str, Any]] = {
    "Q4_0": {"bits": 4, "group_size": 32},
    "Q4_1": {"bits": 4, "group_size": 32, "symmetric": False},
    "Q5_0": {"bits": 5, "group_size": 32},
    "Q8_0": {"bits": 8, "group_size": 32},
    "Q4_K": {"bits": 4, "group_size": 32, "symmetric": False, "options": SUPER},
    "Q6_K": {"bits": 6, "group_size": 16, "options": SUPER},
}
INSTALLED = importlib.util.find_spec("llama_cpp") is not None
needs_llama_cpp = pytest.mark.skipif(not INSTALLED, reason="llama.cpp is not here: pip install llama-cpp-python")


@needs_llama_cpp
@pytest.mark.parametrize("kind", GRIDS)
def test_the_sample_model_is_served(tmp_path: Path, kind: str) -> None:
    lmpress.quantize(SAMPLE, tmp_path / "q", method="rtn", **GRIDS[kind])
    lmpress.export(tmp_path / "q", tmp_path / "gguf", format="gguf")
    (finding,) = lmpress.verify(tmp_path / "gguf", against=tmp_path / "q", runtime=["llama.cpp"]).findings
    assert finding.ok, finding
    assert finding.versions.keys() == {"llama-cpp-python", "gguf"}
    assert finding.steps == 0 or (kind == "Q4_1" and finding.steps < 0.02)  # the minima of Q4_1 are rounded to float16


@needs_llama_cpp
def test_a_wrong_scale_is_found(tmp_path: Path) -> None:
    lmpress.quantize(SAMPLE, tmp_path / "q", method="rtn", bits=4, group_size=32)
    lmpress.export(tmp_path / "q", tmp_path / "gguf", format="gguf")
    tensors, layer = safetensors_io.read(tmp_path / "q" / "model.safetensors"), "model.layers.3.self_attn.k_proj"
    tensors[f"{layer}.weight_scale"][5, 1] *= 1.5
    safetensors_io.write(tmp_path / "q" / "model.safetensors", tensors)
    (finding,) = lmpress.verify(tmp_path / "gguf", against=tmp_path / "q", runtime=["llama.cpp"]).findings
    assert not finding.ok and finding.wrong_layers == (layer,) and finding.block == 3


@needs_llama_cpp
@pytest.mark.parametrize("block", [0, 5, 7])
def test_a_difference_outside_the_packed_layers_is_found_in_its_block(tmp_path: Path, block: int) -> None:
    lmpress.quantize(SAMPLE, tmp_path / "q", method="rtn", bits=4, group_size=32)
    lmpress.export(tmp_path / "q", tmp_path / "gguf", format="gguf")
    tensors, norm = (
        safetensors_io.read(tmp_path / "q" / "model.safetensors"),
        f"model.layers.{block}.input_layernorm.weight",
    )
    safetensors_io.write(tmp_path / "q" / "model.safetensors", tensors | {norm: tensors[norm] * 2})
    (finding,) = lmpress.verify(tmp_path / "gguf", against=tmp_path / "q", runtime=["llama.cpp"]).findings
    assert not finding.ok and finding.wrong_layers == () and finding.block == block, finding


@pytest.mark.skipif(INSTALLED, reason="llama-cpp-python is installed")
def test_a_missing_llama_cpp_is_reported() -> None:
    with pytest.raises(UsageError, match="needs the package llama-cpp-python; pip install llama-cpp-python"):
        llamacpp.library()

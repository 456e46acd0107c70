"""OpenVINO's IR: codes stay packed in the file, served weights are equal, and a missing package is named."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import lmpress
from lmpress.errors import UsageError


@pytest.fixture
def model(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Path:
    sizes = {"vocab_size": 16, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    make_model("llama", **sizes, attention_bias=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (2, False)])
def test_codes_stay_packed_and_are_served_unchanged(model: Path, bits: int, symmetric: bool) -> None:
    pytest.importorskip("openvino")
    source = model.parent / "q"
    lmpress.quantize(model, source, method="rtn", bits=bits, symmetric=symmetric, group_size=32)
    report = lmpress.export(source, model.parent / "ir", format="openvino")
    files = {file.name: file.stat().st_size for file in report.out.iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "config.json"} <= set(files)
    assert not any(name.startswith(("model.onnx", ".onnx")) for name in files)
    assert report.bytes_after == files["openvino_model.xml"] + files["openvino_model.bin"]
    assert "quantization_config" not in json.loads((report.out / "config.json").read_text())
    weights = sum(rows * columns for rows, columns in SHAPES) * 2
    assert weights * bits / 8 < files["openvino_model.bin"] < weights * (bits + 40 / 32) / 8 + 45_000
    (finding,) = lmpress.verify(report.out, against=source, runtime=["openvino"]).findings
    assert finding.ok and finding.steps is not None and finding.steps < 1e-4, finding
    assert finding.outputs is not None and finding.outputs.logits < 1e-4 and finding.block is None


SHAPES = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]


def test_a_missing_package_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    lmpress.quantize(model, model.parent / "q", method="rtn", group_size=32)
    with pytest.raises(UsageError, match=r"needs the package openvino; pip install 'lmpress\[openvino\]'"):
        lmpress.export(model.parent / "q", model.parent / "ir", format="openvino")
    assert not (model.parent / "ir").exists()


def test_a_packed_embedding_gives_the_same_rows(model: Path) -> None:
    pytest.importorskip("openvino")
    recipe = "passes: [{method: rtn, scheme: {weights: {group_size: 32}}}]\nembedding: {bits: 8, group_size: 32}\n"
    (model.parent / "recipe.yaml").write_text(recipe)
    lmpress.run(model, model.parent / "q", model.parent / "recipe.yaml")
    lmpress.export(model.parent / "q", model.parent / "ir", format="openvino")
    (finding,) = lmpress.verify(model.parent / "ir", against=model.parent / "q", runtime=["openvino"]).findings
    assert finding.ok and finding.steps is not None and finding.steps < 1e-4, finding

"""A budget shared between layers: kept exactly, spent where it counts, measured once, written as an ordinary recipe."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lmpress
from lmpress.cli import app
from lmpress.compress import pipeline
from lmpress.compress.allocate.allocate import decided
from lmpress.compress.allocation import allocate
from lmpress.errors import UsageError
from lmpress.recipes import schema
from lmpress.recipes.naming import default_out
from lmpress.recipes.options import pruning_recipe, quantization_recipe
from lmpress.recipes.schema import Recipe


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh hgfedcba " * 60)
    return str(file)


def quantizing(text: str, average: float) -> Recipe:
    return quantization_recipe(
        method="rtn", average_bits=average, group_size=8, calib=text, samples=4, seq_len=16, keep=["*.k_proj"]
    )


def test_the_budget_is_kept_and_the_plan_of_the_decision_is_exact(tiny: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    report = lmpress.run(tiny, out, quantizing(text, 6.2))
    bits = {layer["name"]: layer["bits"] for layer in report.layers}
    assert len(set(bits.values())) > 1
    assert report.bits_per_weight <= 6.2
    assert not any("k_proj" in str(name) for name in bits)
    assert report.bytes_after == (out / "model.safetensors").stat().st_size
    written = schema.read(out / "recipe.yaml")
    assert written.allocate is None
    assert {name: changes["bits"] for name, changes in written.overrides.items()} == bits
    again = lmpress.run(tiny, tmp_path / "again", written)  # nothing is measured any more
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert again.bits_per_weight == report.bits_per_weight
    assert not list(tmp_path.glob(".*allocation*"))
    found = lmpress.evaluate(out, text, seq_len=16, against=tiny)
    assert found.kl is not None and math.isfinite(found.kl)


def test_zeros_are_shared_and_add_up(tiny: Path, tmp_path: Path, text: str) -> None:
    options = {"method": "magnitude", "calib": text, "samples": 4, "seq_len": 16}
    shared = lmpress.prune(tiny, tmp_path / "shared", sparsity=0.5, allocate=True, **options)
    even = lmpress.prune(tiny, tmp_path / "even", sparsity=0.5, **options)

    def zeros(report: pipeline.RunReport) -> int:
        sizes = {layer.name: math.prod(layer.shape) for layer in report.plan.layers}
        return sum(round(float(layer["sparsity"]) * sizes[str(layer["name"])]) for layer in report.layers)

    assert zeros(shared) >= zeros(even)
    assert len({layer["sparsity"] for layer in shared.layers}) > 1


def test_what_was_measured_survives_a_run_that_failed(
    tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = quantizing(text, 6.2), tmp_path / "out"
    measured = []
    spend = allocate.spend
    monkeypatch.setattr(allocate, "spend", lambda *args: measured.append(1) or spend(*args))
    with pytest.raises(KeyboardInterrupt), decided(tiny, out, recipe) as first:
        raise KeyboardInterrupt
    with decided(tiny, out, recipe) as second:
        assert second == first
    assert len(measured) == 1
    with pytest.raises(KeyboardInterrupt), decided(tiny, out, recipe):  # it was done with, so it is measured anew
        raise KeyboardInterrupt
    with decided(tiny, out, quantizing(text, 7.0)) as other:  # another request
        assert other != second
    assert len(measured) == 3


def test_what_a_recipe_says_of_a_layer_stays(tiny: Path, tmp_path: Path, text: str) -> None:
    fixed = {"*.0.mlp.up_proj": {"bits": 8}}
    recipe = quantizing(text, 6.2).model_copy(update={"overrides": fixed})
    report = lmpress.run(tiny, tmp_path / "out", recipe)
    assert [layer["bits"] for layer in report.layers if str(layer["name"]).endswith("0.mlp.up_proj")] == [8]
    assert report.bits_per_weight <= 6.2


def test_a_dry_run_says_what_is_decided_later(tiny: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    arguments = ["quantize", str(tiny), "--average-bits", "6", "--dry-run", "--calib", text, "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    planned = pipeline.plan(tiny, quantization_recipe(bits=4))
    weights = sum(math.prod(layer.shape) for layer in planned.layers if layer.args)
    assert json.loads(file.read_text())["layer_bytes_at_most"] == weights * 6 // 8
    assert "measured when" in " ".join(result.stderr.split())


def test_impossible_wishes_are_refused(tiny: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="averages 1"):
        lmpress.run(tiny, tmp_path / "out", quantizing(text, 1.0))
    with pytest.raises(UsageError, match="contradict"):
        quantization_recipe(bits=4, average_bits=3.5)
    with pytest.raises(UsageError, match="pattern"):
        lmpress.prune(tiny, tmp_path / "out", pattern="2:4", allocate=True, calib=text, samples=4, seq_len=16)
    with pytest.raises(UsageError, match="not been allocated yet"):
        pipeline.plan(tiny, quantizing(text, 6.2))
    assert not (tmp_path / "out").exists()


def test_names_of_outputs(tmp_path: Path) -> None:
    assert default_out(tmp_path, quantization_recipe(average_bits=3.5)).name.endswith("-gptq-w3.5")
    assert default_out(tmp_path, pruning_recipe(allocate=True)).name.endswith("-exactobs-s50-allocated")

"""A budget that layers share: kept exactly, allocated by sensitivity, measured once, written as an ordinary recipe."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lmpress
from lmpress.calibrate.model.skeleton import build
from lmpress.cli import app
from lmpress.compress.allocation import allocate
from lmpress.compress.allocation.allocate import allocated
from lmpress.compress.formats.source import open_source
from lmpress.compress.run import Run, RunReport
from lmpress.errors import UsageError
from lmpress.recipes import schema
from lmpress.recipes.naming import default_out
from lmpress.recipes.options.prune import PruneOptions
from lmpress.recipes.options.quantize import QuantizeOptions
from lmpress.recipes.schema import Recipe


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh hgfedcba " * 60)
    return str(file)


def quantizing(text: str, average: float) -> Recipe:
    return QuantizeOptions(
        method="rtn", average_bits=average, group_size=8, calib=text, samples=4, seq_len=16, keep=["*.k_proj"]
    ).recipe()


def test_the_budget_is_kept_and_the_plan_after_the_allocation_is_exact(tiny: Path, tmp_path: Path, text: str) -> None:
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
    again = lmpress.run(tiny, tmp_path / "again", written)  # nothing is measured again
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert again.bits_per_weight == report.bits_per_weight
    assert not list(tmp_path.glob(".*allocation*"))
    found = lmpress.evaluate(out, text, seq_len=16, against=tiny)
    assert found.kl is not None and math.isfinite(found.kl)


def test_allocated_zeros_add_up_to_the_budget(tiny: Path, tmp_path: Path, text: str) -> None:
    options = {"method": "magnitude", "calib": text, "samples": 4, "seq_len": 16}
    shared = lmpress.prune(tiny, tmp_path / "shared", sparsity=0.5, allocate=True, **options)
    even = lmpress.prune(tiny, tmp_path / "even", sparsity=0.5, **options)

    def zeros(report: RunReport) -> int:
        sizes = {layer.name: math.prod(layer.shape) for layer in report.plan.layers}
        return sum(round(float(layer["sparsity"]) * sizes[str(layer["name"])]) for layer in report.layers)

    assert zeros(shared) >= zeros(even)
    assert len({layer["sparsity"] for layer in shared.layers}) > 1


def test_a_failed_run_keeps_its_measurements(
    tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, source = quantizing(text, 6.2), open_source(tiny)
    given = (source, build(source), tmp_path / "out")
    measured = []
    choose = allocate.choose_overrides
    monkeypatch.setattr(allocate, "choose_overrides", lambda *args: measured.append(1) or choose(*args))
    with pytest.raises(KeyboardInterrupt), allocated(*given, recipe) as first:
        raise KeyboardInterrupt
    with allocated(*given, recipe) as second:
        assert second == first
    assert len(measured) == 1
    with pytest.raises(KeyboardInterrupt), allocated(*given, recipe):  # that run ended well, so it is measured again
        raise KeyboardInterrupt
    with allocated(*given, quantizing(text, 7.0)) as other:  # another request
        assert other != second
    assert len(measured) == 3


def test_overrides_of_the_recipe_are_kept(tiny: Path, tmp_path: Path, text: str) -> None:
    fixed = {"*.0.mlp.up_proj": {"bits": 8}}
    recipe = quantizing(text, 6.2).model_copy(update={"overrides": fixed})
    report = lmpress.run(tiny, tmp_path / "out", recipe)
    assert [layer["bits"] for layer in report.layers if str(layer["name"]).endswith("0.mlp.up_proj")] == [8]
    assert report.bits_per_weight <= 6.2


def test_a_dry_run_shows_the_most_that_the_layers_take(tiny: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    arguments = ["quantize", str(tiny), "--average-bits", "6", "--dry-run", "--calib", text, "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    planned = Run.of(tiny, QuantizeOptions(bits=4).recipe()).plan
    weights = sum(math.prod(layer.shape) for layer in planned.layers if layer.args)
    assert json.loads(file.read_text())["layer_bytes_at_most"] == weights * 6 // 8
    assert "measured when" in " ".join(result.stderr.split())


def test_impossible_budgets_are_refused(tiny: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"an average of 1 bits cannot be reached with levels \[2, 3"):
        lmpress.run(tiny, tmp_path / "out", quantizing(text, 1.0))
    with pytest.raises(UsageError, match="--bits and --average-bits are mutually exclusive"):
        QuantizeOptions(bits=4, average_bits=3.5).recipe()
    with pytest.raises(UsageError, match="pattern"):
        lmpress.prune(tiny, tmp_path / "out", pattern="2:4", allocate=True, calib=text, samples=4, seq_len=16)
    assert not (tmp_path / "out").exists()


def test_the_default_name_of_the_output_shows_the_budget(tmp_path: Path) -> None:
    assert default_out(tmp_path, QuantizeOptions(average_bits=3.5).recipe()).name.endswith("-gptq-w3.5")
    assert default_out(tmp_path, PruneOptions(allocate=True).recipe()).name.endswith("-exactobs-s50-allocated")

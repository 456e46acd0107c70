"""The tables of measured figures are those of benchmarks/results/, and the pages of `make interop` those of its results."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHERS = ROOT / "benchmarks" / "others"


@pytest.fixture(scope="module")
def writer() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "measurements.py"))


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The script of `make interop`, whose siblings are imported by their bare names."""
    monkeypatch.setattr(sys, "path", [str(OTHERS), *sys.path])
    return runpy.run_path(str(OTHERS / "interop.py"))


def test_the_pages_are_up_to_date(writer: dict) -> None:
    used: set[str] = set()
    for page in writer["PAGES"]:
        text = page.read_text(encoding="utf-8")
        assert text == writer["filled"](text), f"{page}: run python docs/measurements.py"
        used |= set(re.findall(r"<!-- table (\S+) -->", text))
    assert used == set(writer["TABLES"])


def test_a_figure_that_was_changed_by_hand_is_restored(writer: dict) -> None:
    text = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    wrong = text.replace("| `quantize --method rtn` | 4.42 ", "| `quantize --method rtn` | 4.12 ")
    assert wrong != text and writer["filled"](wrong) == text


def test_a_marker_without_a_table_is_refused(writer: dict) -> None:
    with pytest.raises(KeyError, match="no-such"):
        writer["filled"]("<!-- table no-such -->\n<!-- /table -->")


def test_the_pages_of_interop_are_up_to_date(others: dict, tmp_path: Path) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "interop.json").read_text(encoding="utf-8"))
    docs, readme = tmp_path / "interop.md", tmp_path / "README.md"
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    readme.write_text(before.replace("| `gguf` |", "| `gone` |"), encoding="utf-8")
    others["write_pages"](results, docs, readme)
    assert docs.read_text(encoding="utf-8") == (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    assert readme.read_text(encoding="utf-8") == before and "| `gguf` |" in before


def test_the_short_table_counts_what_is_loaded_and_refused(others: dict) -> None:
    def cell(environment: str, steps: float | None) -> dict:
        return {
            "model": "m", "format": "awq", "environment": environment, "verdict": "proven" if steps is not None else "refused",
            "steps": steps, "logits": steps, "reason": "",
        }  # fmt: skip

    shown = others["summary"]([cell("mlx", 0.0), cell("mlx", 0.006), cell("gptqmodel", None)])
    assert shown.splitlines()[2] == "| `awq` | mlx (2) | 0.006 steps | 6e-03 | gptqmodel (1) |"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


SCRIPTS = sorted(
    path for path in (ROOT / "benchmarks").rglob("*.py") if "ArgumentParser" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_imports_and_prints_its_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    siblings = [path.stem for path in script.parent.glob("*.py")]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [str(script.parent), *sys.path])
        patched.setattr(sys, "argv", [str(script), "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    for name in siblings:
        sys.modules.pop(name, None)
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"benchmarks/{script.relative_to(ROOT / 'benchmarks').as_posix()}" in shown and "--out" in shown

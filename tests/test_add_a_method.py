"""How CONTRIBUTING.md says that a method is added is true: its files, in a copy of the repository, pass the tests there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".*", "build", "dist", "__pycache__", "*.egg-info", "*.safetensors")
# Left out, as slow: the wheel, imports of all of transformers, and the runs of models but those of the new method.
CHOSEN = "not wheel and not transformers_imports and not sample_model and (not test_cli or help or recipes)"
LINE, REGISTRY = "the registry line", "recipes/methods.py"
HELD_BY = {  # what is left out -> the test of tests/test_methods.py that fails then
    "docs/methods/stochastic.md": "test_every_method_has_a_page[stochastic]",
    "recipes/stochastic-w8.yaml": "test_every_method_has_a_shipped_recipe[stochastic]",
    "tests/compress/methods/quantize/test_stochastic.py": "test_every_method_has_a_test_at_the_mirrored_place[stochastic]",
    LINE: "test_every_file_with_a_method_has_a_line",
}


def parts() -> dict[str, str]:
    """The files of the page by their paths, and the registry line: what stands in the first code block below each heading."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("## How to add a method")[2].partition("\n## Where things are")[0]
    steps = re.findall(
        r"^### \d\. The [^`\n]*`([^`]+)`[^\n]*\n.*?^```\w+\n(.*?)^```$", section, re.MULTILINE | re.DOTALL
    )
    return {LINE if path == "METHODS" else path: text for path, text in steps}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository with the method added as the page says."""
    folder = tmp_path / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "lmpress").symlink_to(folder)
    for path, text in parts().items():
        if path == LINE:
            registry = (folder / REGISTRY).read_text(encoding="utf-8")
            before, begin, after = registry.partition("METHODS: dict[str, Entry] = {\n")
            assert begin, f"{REGISTRY} has no METHODS"
            (folder / REGISTRY).write_text(before + begin + text + after, encoding="utf-8")
        else:
            assert not (folder / path).exists(), f"{path} exists already"
            (folder / path).write_text(text, encoding="utf-8")
    return folder


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process in the copy, which imports `lmpress` from there."""
    environment = os.environ | {"PYTHONPATH": str(copy.parent / "path"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )


def test_the_page_has_all_parts() -> None:
    assert parts().keys() == HELD_BY.keys() | {"compress/methods/quantize/stochastic.py"}


def test_a_method_added_as_the_page_says_passes_the_tests(copy: Path) -> None:
    generated = run(copy, "docs/generate.py")
    assert generated.returncode == 0, generated.stderr
    for page in ("README.md", "docs/index.md", "docs/taxonomy.md"):
        assert "stochastic" in (copy / page).read_text(encoding="utf-8"), page
    for words in (("quantize", "--help"), ("recipes", "list")):
        assert "stochastic" in run(copy, "-m", "lmpress.cli", *words).stdout, words
    tests = (
        "test_methods.py",
        "test_docs.py",
        "test_taxonomy.py",
        "test_layout.py",
        "test_cli.py",
        "recipes",
        "compress/methods/quantize/test_stochastic.py",
    )
    done = run(copy, "-m", "pytest", "-q", "-k", CHOSEN, *(f"tests/{test}" for test in tests))
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 300


@pytest.mark.parametrize("part", HELD_BY)
def test_a_method_without_one_of_its_parts_fails_a_test(part: str, copy: Path) -> None:
    if part == LINE:
        shutil.copy(ROOT / REGISTRY, copy / REGISTRY)
        (copy / "recipes" / "stochastic-w8.yaml").unlink()
    else:
        (copy / part).unlink()
    done = run(copy, "-m", "pytest", "-q", "--noconftest", "tests/test_methods.py")  # without torch
    failed = re.findall(r"^FAILED tests/test_methods\.py::(\S+)", done.stdout, re.MULTILINE)
    assert failed == [HELD_BY[part]], done.stdout

"""A method is a file, a test, a recipe, a page and a line of the registry: none of them is missing."""

from pathlib import Path

import pytest
import yaml

from lmpress.recipes.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "compress" / "methods"


def methods_of(recipe: Path) -> set[str]:
    """The methods of a shipped recipe, or of all stages of a chain."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    stages = [stage["compress"] for stage in content.get("stages", []) if "compress" in stage]
    return {entry["method"] for each in stages or [content] for entry in each["passes"]}


def test_every_file_with_a_method_has_a_line() -> None:
    files = [path for path in FOLDER.glob("*/*.py") if "\nMETHOD = " in path.read_text(encoding="utf-8")]
    modules = sorted(f"{path.parent.name}.{path.stem}" for path in files)
    assert modules == sorted(entry.module for entry in METHODS.values())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page(name: str) -> None:
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.is_file(), f"write {page.relative_to(ROOT)}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_test_at_the_mirrored_place(name: str) -> None:
    family, _, stem = METHODS[name].module.partition(".")
    test = ROOT / "tests" / "compress" / "methods" / family / f"test_{stem}.py"
    assert test.is_file(), f"write {test.relative_to(ROOT)}"
    assert "def test_" in test.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_shipped_recipe(name: str) -> None:
    assert any(name in methods_of(recipe) for recipe in (ROOT / "recipes").glob("*.yaml")), (
        f"write recipes/{name}-*.yaml"
    )

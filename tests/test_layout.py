"""The rules that let the repository's root be the import package `lmpress`, each with the accident that it prevents."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE_THE_PACKAGE = {"tests", "benchmarks", "examples", "docs"}
LEFT_BY_TOOLS = {"build", "dist", "__pycache__", "lmpress.egg-info"}

MAX_LINES, MAX_FILES = 400, 12
# Paths that may be longer or fuller than that, each with its reason in a comment.
ALLOWED_LONG: set[str] = set()
ALLOWED_FULL: set[str] = set()


def python_files() -> Iterator[Path]:
    """Every Python file of the repository, relative to its root."""
    return files_with_suffix(".py")


def files_with_suffix(*suffixes: str) -> Iterator[Path]:
    for folder, below, names in os.walk(ROOT):
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in LEFT_BY_TOOLS)
        yield from (Path(folder, name).relative_to(ROOT) for name in sorted(names) if name.endswith(suffixes))


def package_files() -> list[Path]:
    return [path for path in python_files() if path.parts[0] not in OUTSIDE_THE_PACKAGE]


def declared_packages() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["setuptools"]["packages"]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the root, with the current folder on its path, as it is for a user who works there."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def imported_by(*arguments: str) -> set[str]:
    """The modules that a fresh interpreter imports when it is run with `arguments`."""
    done = run_python("-X", "importtime", *arguments)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))


def absolute_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            yield node.module


# --- rule 1: the mapped root and an explicit list of packages ----------------------------------------------------------


def test_the_declared_packages_are_the_folders_with_python_files():
    folders = {path.parent for path in package_files()}
    assert sorted(declared_packages()) == sorted(".".join(["lmpress", *folder.parts]) for folder in folders)


# --- rule 2: siblings by relative imports only -------------------------------------------------------------------------


@pytest.mark.parametrize("path", package_files(), ids=str)
def test_siblings_are_imported_relatively(path):
    own = {"lmpress", "cli", "errors", *(file.parts[0] for file in package_files() if len(file.parts) > 1)}
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert [name for name in absolute_imports(tree) if name.split(".")[0] in own] == []


# --- rule 3: our `kernels` never replaces Hugging Face's --------------------------------------------------------------


def test_kernels_is_not_a_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_package_kernels_installed_elsewhere_wins_in_the_root(tmp_path, monkeypatch):
    theirs = tmp_path / "kernels" / "__init__.py"
    theirs.parent.mkdir()
    theirs.touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = run_python("-c", "import kernels; print(kernels.__file__)")
    assert done.stdout.strip() == str(theirs), done.stderr


def test_transformers_imports_in_the_root():
    done = run_python("-c", "import transformers.modeling_utils")
    assert done.returncode == 0, done.stderr


# --- rule 4: nothing else at the root, no packages under tests/ --------------------------------------------------------


def test_the_root_holds_only_the_api_and_the_command():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py", "errors.py"}


def test_tests_are_not_a_package():
    assert [path for path in python_files() if path.parts[0] == "tests" and path.name == "__init__.py"] == []


# --- rule 5: the wheel -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in a wheel built from a copy of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    heavy = shutil.ignore_patterns(".*", *LEFT_BY_TOOLS, "*.safetensors")
    shutil.copytree(ROOT, folder / "source", ignore=heavy)
    build = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(folder)!r}))"
    command = [sys.executable, "-c", build]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with ZipFile(folder / done.stdout.splitlines()[-1]) as archive:
        return archive.namelist()


def test_the_wheel_installs_only_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel}
    metadata = {top for top in tops if re.fullmatch(r"lmpress-[^-]+\.dist-info", top)}
    assert tops - metadata == {"lmpress"}
    assert len(metadata) == 1


def test_the_wheel_holds_every_file_of_the_package(wheel):
    below = {path.parts[0] for path in package_files() if len(path.parts) > 1}
    found = [path for folder in below for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {
        "__init__.py",
        "cli.py",
        "errors.py",
        "py.typed",
        *(path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts),
    }
    assert {name.removeprefix("lmpress/") for name in wheel if name.startswith("lmpress/")} == expected


def test_the_wheel_holds_the_recipes(wheel):
    assert any(re.fullmatch(r"lmpress/recipes/[\w-]+\.yaml", name) for name in wheel)


# --- quick to import, and small ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("-c", "import lmpress"), ("-m", "lmpress.cli", "--help")], ids=" ".join)
def test_torch_is_not_imported_before_it_is_needed(arguments):
    modules = imported_by(*arguments)
    assert "lmpress" in modules
    assert modules.isdisjoint({"torch", "transformers", "datasets"})


def test_no_file_is_too_long():
    files = files_with_suffix(".py", ".c", ".h")
    lines = {path.as_posix(): (ROOT / path).read_text(encoding="utf-8").count("\n") for path in files}
    assert {path for path, count in lines.items() if count > MAX_LINES} == ALLOWED_LONG


def test_no_folder_is_too_full():
    files = Counter(path.parent.as_posix() for path in python_files())
    assert {folder for folder, count in files.items() if count > MAX_FILES} == ALLOWED_FULL

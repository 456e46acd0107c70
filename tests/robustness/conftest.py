"""The harnesses are scripts beside their tests: run as a user would, or imported by their names."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch):
    """Gives a module of this folder by its name."""
    monkeypatch.syspath_prepend(FOLDER)
    names = [path.stem for path in FOLDER.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name: str) -> ModuleType:
        return import_module(name)

    return load

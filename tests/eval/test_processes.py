"""Child processes run no code from the current folder, the checkpoint's folder or a relative folder in PYTHONPATH."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmpress
from lmpress.errors import UsageError
from lmpress.eval import processes
from lmpress.eval.timing import speed

MODULES = ("torch", "numpy", "json", "lmpress", "safetensors", "sitecustomize", "usercustomize", "encodings")


@pytest.fixture
def hostile(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkpoint whose folder holds modules that leave a mark if they are run; it is the current folder."""
    folder = tmp_path / "q"
    lmpress.quantize(tiny, folder, method="rtn", bits=8, group_size=8)
    mark = tmp_path / "mark"
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write('{name} ')\nraise SystemExit(7)\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", os.environ.get("PYTHONPATH", "")]))
    yield folder
    assert not mark.exists(), mark.read_text()


def test_verify_runs_nothing_from_the_checkpoint(hostile: Path) -> None:
    (finding,) = lmpress.verify(".", runtime=["lmpress"], python=sys.executable).findings
    assert finding.ok, finding


def test_verify_finds_a_relative_checkpoint_and_a_relative_interpreter(hostile: Path, tmp_path: Path) -> None:
    (tmp_path / "environment").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "environment").chmod(0o755)
    (finding,) = lmpress.verify("../q", runtime=["lmpress"], python="../environment").findings
    assert finding.ok, finding


def test_the_measurement_of_memory_runs_nothing_from_the_checkpoint(hostile: Path) -> None:
    arguments = {"path": ".", "device": "cpu", "dtype": "float32", "kernel": None}
    with pytest.raises(lmpress.errors.CompressError, match=r"--speed needs a context of 160 tokens"):
        speed._peak_of_process(arguments)  # the child has loaded the model


def test_the_package_is_found_however_the_parent_found_it(tmp_path: Path) -> None:
    """A copy of the package that is importable only because the parent put its folder on the search path."""
    shutil.copytree(processes.PACKAGE, tmp_path / "lmpress", ignore=shutil.ignore_patterns(".*", "tests", "examples"))
    (tmp_path / "lmpress" / "where.py").write_text("print(__file__)")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from lmpress.eval.processes import run_module\n"
        "print(run_module('lmpress.where', []))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"{tmp_path}/lmpress/where.py" in done.stdout


def test_an_interpreter_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no-python cannot be started: No such file or directory; give --python"):
        processes.run_module("lmpress.cli", [], tmp_path / "no-python")

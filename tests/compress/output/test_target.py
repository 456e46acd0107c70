"""What an output may replace, hidden siblings, the lock, and the exchange of an old result for a new one."""

import os
from functools import partial
from pathlib import Path

import pytest

import lmpress
from lmpress.compress.output import target
from lmpress.compress.output.record import is_result, write_record
from lmpress.errors import StorageError, UsageError

RTN = {"method": "rtn", "group_size": 8}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def home(tiny: Path, tmp_path: Path) -> Path:
    """A folder with foreign files, and the model in models/m."""
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    tiny.rename(home / "models/m")
    (home / "letter.txt").write_text("dear")
    (home / "other").mkdir()
    (home / "other/notes").write_text("mine")
    return home


@pytest.mark.parametrize("out", ["models/m", "models", ".", "models/m/out", "other", "models/m/..", "/", "letter.txt"])
def test_overwrite_replaces_only_results(home: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    before = tree(home)
    with pytest.raises(UsageError):
        lmpress.quantize("models/m", out, overwrite=True, **RTN)
    assert tree(home) == before


def test_overwrite_replaces_results_of_every_command(tiny: Path, tmp_path: Path) -> None:
    lmpress.quantize(tiny, tmp_path / "q", **RTN)
    lmpress.export(tmp_path / "q", tmp_path / "e", format="fp16")
    lmpress.distill(tiny, tmp_path / "d", drop=0.5, choice="spread", steps=0, samples=4, seq_len=16)
    for out in ("q", "e", "d"):
        assert is_result(tmp_path / out)
        lmpress.quantize(tiny, tmp_path / out, overwrite=True, **RTN)
    assert tree(tmp_path / "q") == tree(tmp_path / "e") == tree(tmp_path / "d")
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("report.json", '{"base_model": "m", "recipe": {}}'), ("stages.json", '{"stages": [], "done": []}')],
    ids=["report", "stages"],
)
def test_results_of_earlier_versions_count(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "notes").write_text("mine")
    assert not is_result(tmp_path)
    (tmp_path / name).write_text(content)
    assert is_result(tmp_path)


def result(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "a").write_text(content)
    write_record(folder)
    return folder


@pytest.mark.parametrize("failing", [1, 2], ids=["away", "in place"])
def test_a_failed_exchange_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    old, new = result(tmp_path / "out", "old"), result(tmp_path / "new", "new")
    rename, calls = Path.rename, []

    def fail(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        target.publish(new, old)
    assert (old / "a").read_text() == "old"
    monkeypatch.setattr(Path, "rename", rename)
    target.publish(new, old)
    assert (old / "a").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    result(tmp_path / ".out.replaced", "old")
    with pytest.raises(UsageError, match="exists already"), target.claimed(tmp_path / "out", False):
        pass
    assert (tmp_path / "out/a").read_text() == "old"


def test_a_second_run_on_one_output_ends_at_once(tiny: Path, tmp_path: Path) -> None:
    with target.claimed(tmp_path / "out", False):
        with pytest.raises(UsageError, match="another run is writing"):
            lmpress.quantize(tiny, tmp_path / "out", **RTN)
        lmpress.quantize(tiny, tmp_path / "other", **RTN)
    lmpress.quantize(tiny, tmp_path / "out", **RTN)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["partial", "growing", "replaced"])
def test_a_working_folder_that_is_a_link_is_refused(tiny: Path, tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    packed = tmp_path / "packed"
    lmpress.quantize(tiny, packed, **RTN)
    (tmp_path / f".out.{kind}").symlink_to(victim)
    write = (
        partial(lmpress.export, packed, format="fp16") if kind == "growing" else partial(lmpress.quantize, tiny, **RTN)
    )
    with pytest.raises(UsageError, match="is not a directory"):
        write(out=tmp_path / "out", overwrite=True)
    assert tree(victim) == {"file": b"mine"}


def test_working_folders_are_private_and_foreign_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.make_private(tmp_path / "a/own")
    assert (tmp_path / "a/own").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UsageError, match="belongs to another user"):
        target.make_private(tmp_path / "a/own")


def test_a_result_is_as_public_as_other_folders(tiny: Path, tmp_path: Path) -> None:
    lmpress.quantize(tiny, tmp_path / "out", **RTN)
    lmpress.export(tmp_path / "out", tmp_path / "exported", format="fp16")
    (tmp_path / "like").mkdir()
    modes = {(tmp_path / name).stat().st_mode for name in ("out", "exported", "like")}
    assert len(modes) == 1


def test_names_that_are_too_long_are_one_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File name too long"):
        lmpress.quantize(tiny, tmp_path / ("x" * 250), **RTN)

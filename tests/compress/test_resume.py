"""Finished work survives any failure: errors of every kind, damaged parts, a stop after the result has its name."""

import errno
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.compress import workspace
from lmpress.compress.command.console import Pace
from lmpress.compress.output import target
from lmpress.compress.report.progress import Event
from lmpress.errors import StorageError, UsageError

SMALL: dict[str, Any] = {"samples": 8, "seq_len": 16, "group_size": 8}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 60)
    return {"calib": str(tmp_path / "text.txt"), **SMALL}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop(model: Path, out: Path, error: BaseException, options: dict[str, Any]) -> None:
    """A run that ends with `error` when its second block begins."""

    def end(event: Event) -> None:
        if (event.phase, event.block) == ("load", 1):
            raise error

    with pytest.raises(type(error)):
        lmpress.quantize(model, out, observer=end, **options)


def resumed(model: Path, out: Path, options: dict[str, Any]) -> list[tuple[str, int]]:
    """The blocks where the same call resumes, and those that it solves."""
    seen: list[Event] = []
    lmpress.quantize(model, out, observer=seen.append, **options)
    return [(event.phase, event.block) for event in seen if event.phase in ("resume", "write")]


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error"), RuntimeError("CUDA error"), KeyError("a bug")], ids=repr
)
def test_any_error_keeps_finished_blocks(tiny: Path, tmp_path: Path, options: dict[str, Any], error: Exception) -> None:
    stop(tiny, tmp_path / "out", error, options)
    assert resumed(tiny, tmp_path / "out", options) == [("resume", 1), ("write", 1)]
    lmpress.quantize(tiny, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_impossible_request_leaves_nothing(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    stop(tiny, tmp_path / "out", UsageError("impossible"), options)
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("name", ["block-00000.json", "block-00000.safetensors"])
def test_a_damaged_part_is_done_again(tiny: Path, tmp_path: Path, options: dict[str, Any], name: str) -> None:
    stop(tiny, tmp_path / "out", MemoryError(), options)
    part = tmp_path / ".out.partial/parts" / name
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert resumed(tiny, tmp_path / "out", options) == [("write", 0), ("write", 1)]
    lmpress.quantize(tiny, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_stop_after_the_name_is_given_is_cleaned_up_by_the_same_call(
    tiny: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = target.remove_working

    def fail(folder: Path) -> None:
        if (tmp_path / "out").exists():
            raise StorageError("stopped")
        remove(folder)

    monkeypatch.setattr(target, "remove_working", fail)
    with pytest.raises(StorageError, match="stopped"):
        lmpress.quantize(tiny, tmp_path / "out", **options)
    monkeypatch.undo()
    before = contents(tmp_path / "out")
    assert (tmp_path / ".out.partial").exists()
    with pytest.raises(UsageError, match="exists already"):  # what another request gets
        lmpress.quantize(tiny, tmp_path / "out", **options | {"bits": 3})
    report = lmpress.quantize(tiny, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before and not list(tmp_path.glob(".*"))
    assert len(report.layers) == 14 and report.verdict.word
    with pytest.raises(UsageError, match="exists already"):
        lmpress.quantize(tiny, tmp_path / "out", **options)


def test_a_resumed_run_needs_only_the_space_of_the_rest(
    tiny: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lmpress.quantize(tiny, tmp_path / "whole", **options).plan.bytes_after
    stop(tiny, tmp_path / "out", MemoryError(), options)
    done = (tmp_path / ".out.partial/parts/block-00000.safetensors").stat().st_size

    def disk(free: int) -> None:
        usage = type(shutil.disk_usage("/"))(2 * free, free, free)
        monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: usage)

    disk(2 * whole - done - 1)
    with pytest.raises(StorageError, match="bytes free"):
        lmpress.quantize(tiny, tmp_path / "out", **options)
    disk(2 * whole - done)
    assert resumed(tiny, tmp_path / "out", options) == [("resume", 1), ("write", 1)]


def test_a_changed_tokenizer_is_another_request(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    stop(tiny, tmp_path / "out", MemoryError(), options)
    (tiny / "special_tokens_map.json").write_text("{}\n\n")
    with pytest.raises(UsageError, match="other settings"):
        lmpress.quantize(tiny, tmp_path / "out", **options)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.ENOLINK])
def test_every_error_of_writing_names_the_file(tmp_path: Path, number: int) -> None:
    with pytest.raises(StorageError, match="a/file") as caught, safetensors_io.storage_errors(tmp_path / "a/file"):
        raise OSError(number, "reason")
    assert caught.value.hint


def test_blocks_of_an_earlier_run_do_not_count_for_the_time_left() -> None:
    pace = Pace()
    pace.after(Event("resume", 8, 10), 0.0)
    for index in range(8):
        pace.after(Event("block", index, 10), index / 10)
    assert pace.after(Event("block", 8, 10), 60.7) == (9, "about 1:00 left")


TERMINATED = """
import os, signal, sys
from lmpress.cli import app
from lmpress.compress import pipeline

emit = pipeline.Walk.emit
def terminate(self, index, phase, *rest, **figures):
    if (phase, index) == ("load", 1):
        os.kill(os.getpid(), signal.SIGTERM)
    emit(self, index, phase, *rest, **figures)
pipeline.Walk.emit = terminate
app(sys.argv[1:])
"""


def test_sigterm_is_an_interrupt(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    words = ["quantize", tiny, "-o", tmp_path / "out", "--calib", options["calib"]]
    words += ["--samples", "8", "--seq-len", "16", "--group-size", "8"]
    ran = subprocess.run(
        [sys.executable, "-c", TERMINATED, *map(str, words)],
        cwd=Path(lmpress.__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 130 != -signal.SIGTERM and "error: interrupted" in ran.stderr
    assert resumed(tiny, tmp_path / "out", options) == [("resume", 1), ("write", 1)]


def test_companions_are_files_of_the_model(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (tiny / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match="LICENSE is a symbolic link to a file outside the model folder"):
        lmpress.quantize(tiny, tmp_path / "out", method="rtn", group_size=8)
    assert not (tmp_path / "out").exists()


def test_links_of_the_hub_cache_are_followed(tiny: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny.iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    lmpress.quantize(snapshot, tmp_path / "out", method="rtn", group_size=8)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()

"""Compiling on first use: never stale, incomplete or damaged; a compiler that fails makes the library unavailable."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from lmpress.kernels.cpu import build, folders, library
from lmpress.kernels.kernel import Unavailable

SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small C file, an empty cache, and a compiler or a skip."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        build.find_compiler()
    except Unavailable as error:
        pytest.skip(str(error))
    path = tmp_path / "small.c"
    path.write_text(SOURCE)
    return path


def test_the_library_is_built_once_and_loaded(source: Path) -> None:
    assert build.load(source).answer() == 42
    built = build.compiled(source)
    stamp = built.stat().st_mtime_ns
    assert build.compiled(source) == built and built.stat().st_mtime_ns == stamp
    assert set(built.parent.iterdir()) == {built, build.record_of(built)}  # no temporary file is left


@pytest.mark.parametrize("size", [0, 100, 4096, -1])
def test_a_damaged_library_is_built_again(source: Path, size: int) -> None:
    """The dynamic loader would end the process with SIGBUS if the file were truncated."""
    built = build.compiled(source)
    whole = built.read_bytes()
    built.write_bytes(whole[:size] if size >= 0 else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert build.load(source).answer() == 42
    assert built.read_bytes() == whole and built.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"1 abc\n"])
def test_a_damaged_record_has_the_library_built_again(source: Path, content: bytes) -> None:
    record = build.record_of(build.compiled(source))
    record.write_bytes(content)
    assert build.load(source).answer() == 42
    assert build.is_intact(build.compiled(source)) and record.read_bytes() != content


def test_the_files_of_processes_that_ended_early_are_removed(source: Path) -> None:
    folder = folders.private_folder()
    old, new = folder / ".small-1.abc.so", folder / ".small-2.abc.so"
    for path, age in ((old, 3 * build.SECONDS), (new, 1)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    build.compiled(source)
    assert not old.exists() and new.exists()


def test_a_changed_source_is_built_again(source: Path) -> None:
    before = build.compiled(source)
    source.write_text(SOURCE.replace("42", "43"))
    assert build.compiled(source) != before
    assert build.load(source).answer() == 43


def test_a_changed_header_is_built_again_however_deep_it_is_included(source: Path) -> None:
    source.write_text('#include "parts/number.h"\nint answer(void) { return NUMBER; }\n')
    (source.parent / "parts").mkdir()
    (source.parent / "parts" / "number.h").write_text('#include "deep.h"\n#define NUMBER (DEEP + 1)\n')
    deep = source.parent / "parts" / "deep.h"
    for number in (41, 42):
        deep.write_text(f"#define DEEP {number}\n")
        assert build.load(source).answer() == number + 1


def test_the_fingerprint_of_the_library_covers_all_its_files() -> None:
    folder = library.SOURCE.parent
    assert set(build.included_files(library.SOURCE)) == {library.SOURCE, *folder.rglob("*.h")}


def test_what_does_not_compile_is_unavailable_and_leaves_nothing(source: Path) -> None:
    source.write_text("int answer(void) { return missing; }\n")
    with pytest.raises(Unavailable, match=r"cannot compile small\.c: .*missing"):
        build.load(source)
    assert list(folders.cache_folder().iterdir()) == []


def test_without_a_compiler_the_library_is_unavailable(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="no C compiler found: install gcc or clang"):
        build.load(source)


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, mode: int = 0o755) -> None:
    """A compiler of one's own, the only one on the search path."""
    (folder / "bin").mkdir()
    (folder / "bin" / "cc").write_text(script)
    (folder / "bin" / "cc").chmod(mode)
    monkeypatch.setenv("PATH", str(folder / "bin"))


def test_a_compiler_that_cannot_be_started(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path, monkeypatch, "#!/no/such/interpreter\n")
    with pytest.raises(Unavailable, match=r"bin/cc cannot be started: No such file"):
        build.load(source)


def test_a_compiler_that_hangs_ends_with_its_children(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path, monkeypatch, "#!/bin/sh\n/bin/sleep 60 &\n/bin/sleep 60\n")
    monkeypatch.setattr(build, "VERSION_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"bin/cc did not end within 0\.2 s"):
        build.load(source)
    assert time.monotonic() - start < 20


def test_a_compiler_whose_messages_are_not_utf8(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path, monkeypatch, "#!/bin/sh\nprintf 'error: \\377\\376 gr\\374n\\n' >&2\nexit 1\n")
    with pytest.raises(Unavailable, match=r"cannot compile small\.c: error: \ufffd\ufffd gr\ufffdn"):
        build.load(source)


def answer(source: Path) -> int:
    return build.load(source).answer()


def test_processes_may_build_at_the_same_time(source: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(answer, [source] * 4) == [42] * 4
    assert len(list(folders.cache_folder().iterdir())) == 2

"""Compiling on first use: the cache is private, atomic and never stale; a missing compiler makes the library unavailable."""

import multiprocessing
import os
from pathlib import Path

import pytest

from lmpress.kernels.cpu import build, library
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
    assert list(built.parent.iterdir()) == [built]  # no temporary file is left


def test_only_the_user_may_open_the_cache(source: Path) -> None:
    built = build.compiled(source)
    assert built.stat().st_mode & 0o077 == 0
    assert built.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_open_to_others_is_not_trusted(source: Path, mode: int) -> None:
    folder = build.compiled(source).parent
    folder.chmod(mode)
    with pytest.raises(Unavailable, match="open to other users"):
        build.load(source)


def test_a_file_open_to_others_is_not_loaded(source: Path) -> None:
    build.compiled(source).chmod(0o777)
    with pytest.raises(Unavailable, match="open to other users"):
        build.load(source)


def test_a_linked_folder_is_not_trusted(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    build.cache_folder().parent.mkdir(parents=True)
    build.cache_folder().symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="open to other users"):
        build.load(source)


def test_the_folder_of_another_user_is_not_trusted(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.compiled(source)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(Unavailable, match="open to other users"):
        build.load(source)


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
    assert list(build.cache_folder().iterdir()) == []


def test_without_a_compiler_the_library_is_unavailable(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="no C compiler found: install gcc or clang"):
        build.load(source)


def test_without_a_cache_folder_the_library_is_unavailable(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    with pytest.raises(Unavailable, match="cannot be created"):
        build.load(source)


def answer(source: Path) -> int:
    return build.load(source).answer()


def test_processes_may_build_at_the_same_time(source: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(answer, [source] * 4) == [42] * 4
    assert len(list(build.cache_folder().iterdir())) == 1

"""The built-in corpus: splits are disjoint, stable, and contain the right files."""

import sysconfig
from pathlib import Path
from typing import get_args

import pytest

from lmpress.calibrate.data import builtin_corpus


def write(root: Path, relative: str, content: bytes) -> None:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder in place of the standard library."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def everything() -> list[str]:
    return [text for split in get_args(builtin_corpus.Split) for text in builtin_corpus.documents(split)]


def test_every_file_is_in_exactly_one_split(library: Path) -> None:
    written = [f"# file {i}\n" + "x = 1\n" * 50 for i in range(300)]
    for i, text in enumerate(written):
        write(library, f"package{i % 7}/module{i}.py", text.encode())
    assert sorted(everything()) == sorted(written)


def test_splits_have_their_shares() -> None:
    splits = [builtin_corpus.split_of(f"package/module{i}.py") for i in range(20_000)]
    assert splits.count("heldout") / len(splits) == pytest.approx(0.05, abs=0.01)
    assert splits.count("calibration") / len(splits) == pytest.approx(0.10, abs=0.01)


def test_adding_a_file_moves_no_other_file(library: Path) -> None:
    for i in range(50):
        write(library, f"m{i}.py", (f"# {i}\n" + "y = 2\n" * 50).encode())
    before = {split: builtin_corpus.documents(split) for split in get_args(builtin_corpus.Split)}
    write(library, "added.py", b"# added\n" * 50)
    for split, texts in before.items():
        assert [text for text in builtin_corpus.documents(split) if not text.startswith("# added")] == texts


@pytest.mark.parametrize(
    "relative",
    [
        "site-packages/a.py",
        "dist-packages/b.py",
        "test/test_c.py",
        "lib2to3/tests/d.py",
        "idlelib/idle_test/e.py",
        "__pycache__/f.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "notes.txt",
    ],
)
def test_files_outside_the_corpus_are_left_out(library: Path, relative: str) -> None:
    write(library, relative, b"# text\n" * 100)
    assert everything() == []


def test_short_and_undecodable_files_are_left_out(library: Path) -> None:
    write(library, "short.py", b"x" * (builtin_corpus.MIN_BYTES - 1))
    write(library, "latin.py", b"# \xe9t\xe9\n" * 100)
    write(library, "kept.py", b"k" * builtin_corpus.MIN_BYTES)
    assert everything() == ["k" * builtin_corpus.MIN_BYTES]


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        builtin_corpus.documents("test")  # pyright: ignore[reportArgumentType]


def test_running_library_fills_every_split() -> None:
    texts = {split: builtin_corpus.documents(split) for split in get_args(builtin_corpus.Split)}
    assert all(sum(map(len, split_texts)) > 100_000 for split_texts in texts.values())
    assert builtin_corpus.documents("heldout") == texts["heldout"]

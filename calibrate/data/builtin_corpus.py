"""The built-in offline corpus `python-stdlib`: the source text of the running Python's own standard library.

Calibration and perplexity need text. This corpus exists on every machine that can run lmpress, needs no network and no
licence beyond Python's own, so that the tests, the sample model and first experiments work offline. It depends on the
Python version: compare figures only between runs under the same version.

Every file belongs to exactly one split, chosen by a hash of its relative path. A split therefore does not change when files
are added, and no file is used both for training (or calibration) and for held-out evaluation.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

Split = Literal["calibration", "training", "heldout"]

NAME = "python-stdlib"
MIN_BYTES = 200

_EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"},
)
_MACHINE_SPECIFIC_PREFIX = "_sysconfigdata"
_HELDOUT_PERCENT = 5
_CALIBRATION_PERCENT = 10


def split_of(relative_path: str) -> Split:
    """The split of the file at `relative_path` (POSIX, relative to the library's root)."""
    bucket = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % 100
    if bucket < _HELDOUT_PERCENT:
        return "heldout"
    if bucket < _HELDOUT_PERCENT + _CALIBRATION_PERCENT:
        return "calibration"
    return "training"


def documents(split: Split) -> list[str]:
    """The text of every standard library file in `split`, one string per file, sorted by relative path.

    Raises `ValueError` if there is no such split.
    """
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(get_args(Split))}")
    return [text for path, text in _sources(Path(sysconfig.get_path("stdlib"))) if split_of(path) == split]


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    """Relative POSIX path and text of every file of the corpus under `root`, sorted by path."""
    for relative in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if _is_excluded(relative):
            continue
        text = _read(root / relative)
        if text is not None:
            yield relative, text


def _is_excluded(relative_path: str) -> bool:
    *directories, name = relative_path.split("/")
    return name.startswith(_MACHINE_SPECIFIC_PREFIX) or not _EXCLUDED_DIRECTORIES.isdisjoint(directories)


def _read(path: Path) -> str | None:
    """The file's text with Unix line endings, or None if it has less than `MIN_BYTES` or is not UTF-8."""
    raw = path.read_bytes()
    if len(raw) < MIN_BYTES:
        return None
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None

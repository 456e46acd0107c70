"""The built-in offline corpus `python-stdlib`: the source text of the running Python's own standard library.

Calibration and perplexity need text. This corpus is on every machine that can run lmpress, needs no network and no
licence question beyond Python's own, so the tests, the sample model and a first try of the tool all work offline. It
is specific to the Python version that runs: compare figures only between runs under the same version.

Every file belongs to exactly one split, chosen from a hash of its relative path; a split therefore does not change
when files are added, and no file feeds both training (or calibration) and held-out evaluation.
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
    """The split that the file at `relative_path` (posix, relative to the library's root) belongs to."""
    bucket = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % 100
    if bucket < _HELDOUT_PERCENT:
        return "heldout"
    if bucket < _HELDOUT_PERCENT + _CALIBRATION_PERCENT:
        return "calibration"
    return "training"


def documents(split: Split) -> list[str]:
    """The text of every standard library file in `split`, one string a file, in the order of their relative paths."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(get_args(Split))}")
    return [text for path, text in _sources(Path(sysconfig.get_path("stdlib"))) if split_of(path) == split]


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    """Relative posix path and text of every file under `root` that belongs to the corpus, sorted by path."""
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
    """The file's text with unix line ends, or None where it is too short to be of use or not UTF-8."""
    raw = path.read_bytes()
    if len(raw) < MIN_BYTES:
        return None
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None

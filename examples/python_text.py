"""Python source beyond the built-in corpus to train the sample model on, without copies of its evaluation text."""

import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmpress.calibrate.data.builtin_corpus import documents

# Packages with a permissive licence whose source is added to the standard library's; see the model card.
EXTRA_PACKAGES = ("datasets", "networkx", "pip", "transformers")
LONG_LINE = 40
MAX_SHARED_LINES = 0.2


def extra_documents(characters: int, seed: int) -> list[str]:
    """About `characters` of other Python source: the standard library's tests and `EXTRA_PACKAGES`, in equal parts.

    Files that repeat much of a held-out or calibration file (backports, vendored copies) are excluded.
    """
    reserved = long_lines(documents("heldout") + documents("calibration"))
    sources = [stdlib_test_files(), *(package_files(name) for name in EXTRA_PACKAGES)]
    chosen: list[str] = []
    for paths in sources:
        random.Random(seed).shuffle(paths)
        texts = (text for text in map(read, paths) if long_lines([text]) and is_unlike(text, reserved))
        chosen += take(texts, characters // len(sources))
    return chosen


def stdlib_test_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted((root / "test").rglob("*.py"))


def package_files(name: str) -> list[Path]:
    """Source files of an installed package, without other packages bundled in it; empty if it is not installed."""
    root = Path(sysconfig.get_path("purelib")) / name
    return sorted(p for p in root.rglob("*.py") if "_vendor" not in p.parts)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def long_lines(texts: Iterable[str]) -> set[str]:
    lines = (line.strip() for text in texts for line in text.splitlines())
    return {line for line in lines if len(line) >= LONG_LINE}


def is_unlike(text: str, reserved: set[str]) -> bool:
    """Whether at most `MAX_SHARED_LINES` of the text's long lines are in `reserved`."""
    lines = long_lines([text])
    return len(lines & reserved) <= MAX_SHARED_LINES * len(lines)


def take(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The first of `texts`, until they hold `characters` characters."""
    taken = 0
    for text in texts:
        if taken >= characters:
            return
        taken += len(text)
        yield text

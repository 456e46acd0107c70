"""The figures of a finished block, stored with the SHA-256 of its files: a block is finished if all of them are undamaged."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ...calibrate.model.safetensors_io import write_text

Figures = dict[str, float | int | str]


def write_figures(file: Path, figures: list[Figures], parts: Iterable[Path]) -> None:
    """Write the figures of a block whose `parts` lie in the same folder, all written already."""
    content = {"layers": figures, "files": {part.name: _digest(part) for part in parts}}
    write_text(file, json.dumps(content | {"sha256": _sum(content)}))


def read_figures(file: Path) -> list[Figures] | None:
    """The figures of a block; None if it is not finished, or if one of its files is damaged."""
    try:
        content = json.loads(file.read_text())
        expected = content.pop("sha256")
        intact = all(_digest(file.parent / name) == digest for name, digest in content["files"].items())
        return content["layers"] if intact and expected == _sum(content) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sum(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""`lmpress.json`: the record of a result, which holds the SHA-256 of every weight file and of every tensor.

It marks a directory as a result of lmpress, and it shows damage: `check` reads every weight file and compares.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ...calibrate.model.safetensors_io import CHUNK, read_header, write_text
from ...errors import CompressError

RECORD = "lmpress.json"
FORMAT = 1
WEIGHTS = {".safetensors", ".gguf", ".onnx", ".data", ".xml", ".bin"}
# What results of earlier versions hold instead: a file, and keys of its JSON object.
EARLIER = (
    ("report.json", {"base_model", "recipe"}),
    ("report.json", {"kept", "parameters_after"}),
    ("stages.json", {"stages", "done"}),
)


def write_record(folder: Path, request: str | None = None) -> None:
    """Write the record of the finished result in `folder`; `request` identifies what was asked for."""
    files, tensors = {}, {}
    for file in weight_files(folder):
        files[file.name], found = digests(file)
        tensors |= found
    record = {"format": FORMAT, "request": request, "files": files, "tensors": dict(sorted(tensors.items()))}
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a result; empty if there is none."""
    found = _json(folder / RECORD)
    return found if {"format", "files", "tensors"} <= found.keys() else {}


def is_result(folder: Path) -> bool:
    """Whether lmpress, or an earlier version of it, wrote the directory `folder`."""
    return bool(record_of(folder)) or any(keys <= _json(folder / name).keys() for name, keys in EARLIER)


def check(folder: Path) -> bool:
    """Compare the weight files in `folder` with its record; False if there is no record.

    Raises `CompressError`, which names the file and the tensor, if bytes differ or a file is missing.
    """
    record = record_of(folder)
    for name, expected in sorted(record.get("files", {}).items()):
        file = folder / Path(name).name
        if not file.is_file():
            raise CompressError(f"{file} is missing, and {RECORD} lists it", "the copy is incomplete: repeat it")
        digest, tensors = digests(file)
        if digest != expected:
            known = record["tensors"]
            wrong = next((tensor for tensor, found in tensors.items() if known.get(tensor) != found), None)
            place = "" if wrong is None else f", first in the tensor {wrong}"
            raise CompressError(
                f"{file} is damaged: its SHA-256 is not the one in {RECORD}{place}", "copy or make the result again"
            )
    return bool(record)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a result, sorted by name."""
    return sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS and file.is_file())


def digests(file: Path) -> tuple[str, dict[str, str]]:
    """The SHA-256 (hex) of a file, and of each of its tensors if it is a safetensors file with a valid header."""
    try:
        stored = read_header(file) if file.suffix == ".safetensors" else {}
    except CompressError:
        stored = {}
    whole, tensors = hashlib.sha256(), {}
    with file.open("rb") as stream:
        for name, tensor in sorted(stored.items(), key=lambda item: item[1].start):
            _read(stream, tensor.start - stream.tell(), whole)
            own = hashlib.sha256()
            _read(stream, tensor.spec.nbytes, whole, own)
            tensors[name] = own.hexdigest()
        while chunk := stream.read(CHUNK):
            whole.update(chunk)
    return whole.hexdigest(), tensors


def _read(stream: Any, count: int, *sums: Any) -> None:
    while count > 0 and (chunk := stream.read(min(CHUNK, count))):
        count -= len(chunk)
        for each in sums:
            each.update(chunk)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

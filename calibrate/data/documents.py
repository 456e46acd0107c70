"""Texts: from a file, the built-in corpus or the Hugging Face Hub.

`datasets` and `pyarrow` are imported when they are used: they take a second and 90 MB that most runs do not need.
"""

import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from ...errors import CompressError, UsageError
from .builtin_corpus import documents as builtin_documents

Split = Literal["calibration", "training", "heldout"]

BUILTIN_CORPUS = "python-stdlib"
BOS = "bos"  # the value of `Documents.join` that puts one BOS before every document


@dataclass(frozen=True)
class Documents:
    """Texts and how they become one stream: `join` is `BOS`, or a string that is put between them before tokenising."""

    texts: list[str]
    source: str
    join: str = BOS


def documents(data: str, split: Split) -> Documents:
    """The texts of `data`: a .txt, .jsonl or .parquet file, `python-stdlib`, or a data set of the hub.

    A file has no splits: the same texts serve for both. Raises UsageError for a name that means nothing and
    CompressError for content that cannot be used.
    """
    suffix = Path(data).suffix.lower()
    if data == BUILTIN_CORPUS:
        found = Documents(builtin_documents(split), f"{BUILTIN_CORPUS}/{split}")
    elif suffix in READERS:
        if not Path(data).is_file():
            raise UsageError(f"{data}: no such file")
        found = Documents(READERS[suffix](Path(data)), "/".join(Path(data).absolute().parts[-2:]))
    elif Path(data).exists() or re.fullmatch(r"\.[a-z]+", suffix):
        raise UsageError(f"{data}: cannot read this kind of file", "give a .txt, .jsonl or .parquet file")
    else:
        found = _hub_documents(data, split)
    if not any(text.strip() for text in found.texts):
        raise CompressError(f"{found.source} is empty", "give data with text in it")
    return found


def _plain(path: Path) -> list[str]:
    raw = path.read_bytes()
    try:
        return [raw.decode("utf-8").removeprefix("\ufeff")]
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CompressError(
            f"{path} is not UTF-8: byte {error.start} (line {line}) is 0x{raw[error.start]:02x}", "convert it to UTF-8"
        ) from error


def _json_lines(path: Path) -> list[str]:
    # Split at line feeds only: str.splitlines also cuts at separators that JSON allows inside a string.
    lines = enumerate(_plain(path)[0].split("\n"), start=1)
    return [_json_text(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _json_text(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CompressError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise CompressError(f"{place}: there is no string field `text`", 'every line must look like {"text": "..."}')
    return record["text"]


def _parquet(path: Path) -> list[str]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            texts = file.read(["text"])["text"].to_pylist() if "text" in columns else []
    except pyarrow.ArrowException as error:
        raise CompressError(f"{path} is not a readable parquet file ({error})") from error
    if "text" not in columns:
        raise CompressError(f"{path} has no column `text`", f"its columns are {', '.join(columns)}")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise CompressError(f"{path}, row {number}: `text` is not a string", "drop or convert such rows")
    return texts


READERS = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub: where it is, its splits (calibration, heldout), the text column and how its texts join."""

    path: str
    config: str | None = None
    splits: tuple[str, str] = ("train", "test")
    column: str = "text"
    join: str = BOS
    revision: str | None = None
    shards: tuple[str, str] | None = None
    limits: tuple[int | None, int | None] = (None, None)


# Joins and held-out parts are those of the publications; a BOS per line of these two would ruin every perplexity.
HUB = {
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", join="\n\n"),
    "ptb": HubSet("ptb-text-only/ptb_text_only", column="sentence", join=" ", revision="refs/convert/parquet"),
    "c4": HubSet(
        "allenai/c4",
        splits=("train", "validation"),
        shards=("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
        limits=(20_000, 1_100),
    ),
}


def _hub_documents(data: str, split: Split) -> Documents:
    """Texts of a hub data set: a name in `HUB`, or `org/name[:config]` with splits train and test and a column text."""
    name, _, config = data.partition(":")
    if data not in HUB and "/" not in name:
        raise UsageError(
            f"{data}: no such data", f"give a file, {BUILTIN_CORPUS}, {', '.join(HUB)} or org/name of a hub data set"
        )
    from datasets.exceptions import DatasetsError

    wanted = HUB.get(data) or HubSet(name, config or None)
    which = 1 if split == "heldout" else 0
    part = wanted.splits[which]
    try:
        texts = _download(wanted, which)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise CompressError(
            f"data set {data} ({part}) cannot be fetched from the hub ({' '.join(str(error).split())[:200]})",
            f"give a local .txt, .jsonl or .parquet file, or {BUILTIN_CORPUS}",
        ) from error
    return Documents(texts, f"{data}/{part}", wanted.join)


def _download(wanted: HubSet, which: int) -> list[str]:
    from datasets import load_dataset

    part = wanted.splits[which]
    files = {part: wanted.shards[which]} if wanted.shards else None
    records = load_dataset(
        wanted.path, wanted.config, split=part, data_files=files, revision=wanted.revision, streaming=True
    )
    texts = [record.get(wanted.column) for record in islice(records, wanted.limits[which])]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        raise CompressError(f"data set {wanted.path} has no string column `{wanted.column}`")
    return strings

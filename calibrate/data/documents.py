"""Documents: texts from a file, the built-in corpus or the Hugging Face Hub.

`datasets` and `pyarrow` are imported only when they are used: importing them takes a second and 90 MB of memory.
"""

import re
from dataclasses import dataclass
from itertools import islice
from json import JSONDecodeError
from pathlib import Path

from ...errors import CompressError, UsageError
from ...recipes.parsing import parse_json, readable
from .builtin_corpus import NAME as BUILTIN_CORPUS
from .builtin_corpus import Split
from .builtin_corpus import documents as builtin_documents

BOS = "bos"  # the value of `Documents.join` that puts one BOS token before every document


@dataclass(frozen=True)
class Documents:
    """Texts, their `source`, and `join`: `BOS`, or the string that is put between the texts before they are tokenised."""

    texts: list[str]
    source: str
    join: str = BOS


def documents(data: str, split: Split) -> Documents:
    """The texts of `data`: a .txt, .jsonl or .parquet file, `python-stdlib`, or a data set of the Hugging Face Hub.

    A file has no splits: every split has all of its texts. Raises `UsageError` if `data` is neither a readable file nor a
    known name, and `CompressError` if its content cannot be used or cannot be downloaded.
    """
    suffix = Path(data).suffix.lower()
    if data == BUILTIN_CORPUS:
        found = Documents(builtin_documents(split), f"{BUILTIN_CORPUS}/{split}")
    elif suffix in READERS:
        if not Path(data).is_file():
            raise UsageError(f"{data}: no such file")
        found = Documents(READERS[suffix](Path(data)), "/".join(Path(data).absolute().parts[-2:]))
    elif Path(data).exists() or re.fullmatch(r"\.[a-z]+", suffix):
        raise UsageError(f"{data}: unsupported kind of file", "give a .txt, .jsonl or .parquet file")
    else:
        found = _hub_documents(data, split)
    if not any(text.strip() for text in found.texts):
        raise CompressError(f"{found.source} is empty", "give a file or data set that contains text")
    return found


def _plain(path: Path) -> list[str]:
    with readable(path):
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
        record = parse_json(line)
    except JSONDecodeError as error:
        raise CompressError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:
        raise CompressError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise CompressError(f"{place}: there is no string field `text`", 'every line must look like {"text": "..."}')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        raise CompressError(
            f"{place}: `text` holds half a surrogate pair at character {error.start}", "write the whole pair, or UTF-8"
        ) from error
    return record["text"]


def _parquet(path: Path) -> list[str]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            texts = file.read(["text"])["text"].to_pylist() if "text" in columns else []
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
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
    """A data set of the Hugging Face Hub.

    path, config, revision  as for `datasets.load_dataset`
    splits                  names of the splits used for calibration and for held-out evaluation
    column                  name of the text column
    join                    how its texts are joined, see `Documents`
    shards                  if given, the only file that is read, per split
    limits                  if given, how many records are read, per split
    """

    path: str
    config: str | None = None
    splits: tuple[str, str] = ("train", "test")
    column: str = "text"
    join: str = BOS
    revision: str | None = None
    shards: tuple[str, str] | None = None
    limits: tuple[int | None, int | None] = (None, None)


# Joins and held-out splits are those of the publications; a BOS before every line of the first two would spoil perplexities.
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
    """Texts of a hub data set: a name in `HUB`, or `org/name[:config]` with splits `train` and `test` and a column `text`."""
    name, _, config = data.partition(":")
    if data not in HUB and "/" not in name:
        raise UsageError(
            f"{data}: neither a file nor a known data set",
            f"give a file, {BUILTIN_CORPUS}, {', '.join(HUB)} or org/name of a hub data set",
        )
    from datasets.exceptions import DatasetsError

    hub_set = HUB.get(data) or HubSet(name, config or None)
    which = 1 if split == "heldout" else 0
    part = hub_set.splits[which]
    try:
        texts = _download(hub_set, which)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise CompressError(
            f"data set {data} (split {part}) could not be downloaded from the Hugging Face Hub: "
            f"{' '.join(str(error).split())[:200]}",
            f"give a local .txt, .jsonl or .parquet file, or {BUILTIN_CORPUS}",
        ) from error
    return Documents(texts, f"{data}/{part}", hub_set.join)


def _download(hub_set: HubSet, which: int) -> list[str]:
    from datasets import load_dataset

    part = hub_set.splits[which]
    files = {part: hub_set.shards[which]} if hub_set.shards else None
    records = load_dataset(
        hub_set.path, hub_set.config, split=part, data_files=files, revision=hub_set.revision, streaming=True
    )
    texts = [record.get(hub_set.column) for record in islice(records, hub_set.limits[which])]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        raise CompressError(f"data set {hub_set.path} has no string column `{hub_set.column}`")
    return strings

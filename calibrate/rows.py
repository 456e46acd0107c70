"""Rows of tokens: text from a file, the built-in corpus or the hub, tokenised, packed and cut.

`datasets` and `pyarrow` are imported where they are used: they take a second and 90 MB that most runs do not need.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..compress.errors import CompressError, UsageError
from .corpus import documents as built_in
from .source import gguf_file

Split = Literal["calibration", "training", "heldout"]

BUILT_IN = "python-stdlib"
RANDOM = "random-tokens"  # no data at all, which is enough for ZeroQuant's distillation
BOS = "bos"  # the value of `Documents.join` that puts one BOS before every document
BATCH = 2**17  # characters tokenised at a time: what a tokenizer notes about them takes fifty times their bytes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Documents:
    """Texts and how they become one stream: `join` is `BOS`, or a string that is put between them before tokenising."""

    texts: list[str]
    source: str
    join: str = BOS


@dataclass(frozen=True)
class Rows:
    """Token rows `ids` int64 `[rows, length]`; `mask` bool of the same shape, None where no position is padding."""

    ids: Tensor
    source: str
    vocabulary: int
    mask: Tensor | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the ids, row by row, as little-endian int64."""
        return fingerprint(self.ids)

    @property
    def tokens(self) -> int:
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    @cached_property
    def vocabulary_share(self) -> float:
        """The share of the tokenizer's entries that occur at least once."""
        seen = self.ids if self.mask is None else self.ids[self.mask]
        return seen.unique().numel() / self.vocabulary


def calibration_rows(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int = 0,
    split: Split = "calibration",
) -> Rows:
    """`samples` random rows of `length` tokens from a split of `data`, the same for the same seed.

    Documents are shuffled and tokenised until they suffice (joined texts are tokenised whole), then rows are drawn
    without replacement. Fewer rows than asked for are used with a note. `random-tokens` are uniform over the vocabulary,
    after a BOS where there is one. Raises what `documents` and `pack` raise.
    """
    if samples < 1:
        raise UsageError(f"the number of calibration samples is {samples}", "it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    if data == RANDOM:
        ids = torch.randint(len(tokenizer), (samples, length), generator=generator)
        bos = cast(int | None, tokenizer.bos_token_id)
        if bos is not None:
            ids[:, 0] = bos
        return Rows(ids, RANDOM, len(tokenizer))
    found = documents(data, split)
    if found.join == BOS:
        order = torch.randperm(len(found.texts), generator=generator).tolist()
        found = Documents([found.texts[i] for i in order], found.source, found.join)
    packed = pack(found, tokenizer, length, rows=samples)
    chosen = torch.randperm(len(packed), generator=generator)[:samples]
    shortage = f"{found.source} fills only {len(packed)} rows of {length} tokens, not the {samples} asked for"
    return Rows(packed[chosen], found.source, len(tokenizer), notes=(shortage,) if len(packed) < samples else ())


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int, rows: int | None = None) -> Tensor:
    """The packed stream cut into consecutive rows, int64 `[rows, length]`; the incomplete tail is dropped.

    With `rows`, documents are tokenised only until that many rows are there; there may be more. Raises CompressError
    when the text does not fill a single row.
    """
    tokens = stream(documents, tokenizer, None if rows is None else rows * length)
    return windows(tokens, length, length, documents.source)


def windows(tokens: Tensor, length: int, stride: int, source: str) -> Tensor:
    """Every whole window of the stream `[tokens]`, one each `stride` tokens: `[windows, length]` (a view)."""
    if length < 2:
        raise UsageError(f"the row length is {length}", "it must be at least 2: a token and its successor")
    if len(tokens) < length:
        raise CompressError(
            f"{source} is too short: {len(tokens)} tokens, and one row needs {length}",
            "give more text or a smaller --seq-len",
        )
    return tokens.unfold(0, length, stride)


def stream(documents: Documents, tokenizer: PreTrainedTokenizerBase, enough: int | None = None) -> Tensor:
    """All documents as one stream of ids, int64 `[tokens]`.

    Separate documents are led by exactly one BOS each (by nothing where the tokenizer has none), whatever the tokenizer
    would add by itself; joined texts are tokenised once, with the tokenizer's own special tokens, as publications do.
    At least `enough` tokens end the tokenising of separate documents early.
    """
    if documents.join != BOS:
        joined = documents.join.join(documents.texts)
        return torch.tensor(tokenizer(joined, verbose=False)["input_ids"], dtype=torch.long)
    ids: list[int] = []
    for document in _tokenised(documents.texts, tokenizer):
        ids += document
        if enough is not None and len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.long)


def fingerprint(ids: Tensor) -> str:
    """SHA-256 (hex) over the ids, row by row, as little-endian int64."""
    return hashlib.sha256(ids.contiguous().cpu().numpy().astype("<i8").tobytes()).hexdigest()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; code that comes with it is never run. Raises CompressError when there is none."""
    if not has_tokenizer(path):
        raise CompressError(f"{path} has no tokenizer", "copy the original model's tokenizer files into this folder")
    file = gguf_file(Path(path)) if Path(path).exists() else None
    try:
        if file is not None and not _tokenizer_files(file.parent if Path(path).is_dir() else file):
            from ..compress.formats.gguf.source import tokenizer_of

            return tokenizer_of(file)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompressError(
            f"the tokenizer of {path} cannot be read ({reason})",
            "copy the original model's tokenizer files into this folder",
        ) from error


def has_tokenizer(path: str | Path) -> bool:
    """Whether the folder holds a tokenizer's vocabulary; what is no folder is given the benefit of the doubt."""
    return not Path(path).is_dir() or _tokenizer_files(Path(path)) or gguf_file(Path(path)) is not None


def _tokenizer_files(path: Path) -> bool:
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def context_length(config: PretrainedConfig) -> int | None:
    """The most tokens that the model can read at once, None where its config sets no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def documents(data: str, split: Split) -> Documents:
    """The texts of `data`: a .txt, .jsonl or .parquet file, `python-stdlib`, or a data set of the hub.

    A file has no splits: the same texts serve for both. Raises UsageError for a name that means nothing and
    CompressError for content that cannot be used.
    """
    suffix = Path(data).suffix.lower()
    if data == BUILT_IN:
        found = Documents(built_in(split), f"{BUILT_IN}/{split}")
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
            f"{data}: no such data", f"give a file, {BUILT_IN}, {', '.join(HUB)} or org/name of a hub data set"
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
            f"give a local .txt, .jsonl or .parquet file, or {BUILT_IN}",
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


def _tokenised(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The ids of each text, led by the tokenizer's BOS where it has one and the text does not bring it along."""
    bos = cast(int | None, tokenizer.bos_token_id)
    for batch in _batches(texts):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)
        for ids in cast(list[list[int]], encoded["input_ids"]):
            yield ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, as many at a time as have `BATCH` characters or one more."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch

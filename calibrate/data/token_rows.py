"""Rows of tokens: documents that are tokenised, packed into one stream and cut."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...errors import CompressError, UsageError
from .documents import BOS, Documents, Split, documents

RANDOM = "random-tokens"  # no data at all, which is enough for ZeroQuant's distillation
SCARCE = 0.03  # share of the vocabulary below which the rows carry a note
BATCH = 2**17  # characters tokenised at a time: what a tokenizer notes about them takes fifty times their bytes


@dataclass(frozen=True)
class TokenRows:
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
) -> TokenRows:
    """`samples` random rows of `length` tokens from a split of `data`, the same for the same seed.

    Documents are shuffled and tokenised until they suffice (joined texts are tokenised whole), then rows are drawn
    without replacement. Fewer rows than asked for, and rows with
    little of the vocabulary, are used with a note. `random-tokens` are uniform over the vocabulary,
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
        return TokenRows(ids, RANDOM, len(tokenizer))
    found = documents(data, split)
    if found.join == BOS:
        order = torch.randperm(len(found.texts), generator=generator).tolist()
        found = Documents([found.texts[i] for i in order], found.source, found.join)
    packed = pack(found, tokenizer, length, rows=samples)
    chosen = torch.randperm(len(packed), generator=generator)[:samples]
    rows = TokenRows(packed[chosen], found.source, len(tokenizer))
    notes = []
    if len(packed) < samples:
        notes.append(f"{found.source} fills only {len(packed)} rows of {length} tokens, not the {samples} asked for")
    if rows.vocabulary_share < SCARCE:
        notes.append(
            f"the calibration rows contain only {rows.vocabulary_share:.1%} of the {rows.vocabulary:,} tokens of the "
            "vocabulary: more samples or more varied text cover more"
        )
    return replace(rows, notes=tuple(notes))


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

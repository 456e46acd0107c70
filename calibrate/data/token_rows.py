"""Token rows: documents are tokenised, packed into one stream and cut into rows of equal length."""

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

RANDOM = "random-tokens"  # no data at all, which suffices for ZeroQuant's distillation
SCARCE = 0.03  # share of the vocabulary below which the rows carry a note
BATCH = 2**17  # characters tokenised at a time: a tokenizer's output takes fifty times the bytes of its input


@dataclass(frozen=True)
class TokenRows:
    """Token rows.

    ids         int64 `[rows, length]`
    source      where the text is from, for reports
    vocabulary  number of the tokenizer's entries
    mask        bool `[rows, length]`, true at real tokens; None if no position is padding
    notes       what a report should mention, such as a lack of text
    held_out    whether no pass reads these tokens
    """

    ids: Tensor
    source: str
    vocabulary: int
    mask: Tensor | None = None
    notes: tuple[str, ...] = ()
    held_out: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the ids, row by row, as little-endian int64."""
        return fingerprint(self.ids)

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def check_vocabulary(self, size: int) -> None:
        """Raise `CompressError` if a token is not in the vocabulary of a model, which has `size` entries."""
        largest = int(self.ids.max()) if self.ids.numel() else 0
        if largest >= size:
            raise CompressError(
                f"the tokenizer returns the token {largest}, and the model's vocabulary has {size:,} entries",
                "the tokenizer belongs to another model: copy the files of the right one into the model's folder",
            )

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
    """`samples` random rows of `length` tokens from a split of `data`; the same seed gives the same rows.

    Documents are shuffled and tokenised until they fill `samples` rows (joined texts are tokenised whole), then rows are
    drawn without replacement. If the text fills fewer rows, all of them are used and a note is added, as it is for rows that
    hold little of the vocabulary. The rows of `random-tokens` are uniform over the vocabulary; if the tokenizer has a BOS
    token, it comes first.

    Raises `UsageError` if `samples` is not positive, and what `documents` and `pack` raise.
    """
    if samples < 1:
        raise UsageError(f"the number of calibration samples must be at least 1, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    if data == RANDOM:
        ids = torch.randint(len(tokenizer), (samples, length), generator=generator)
        bos = cast(int | None, tokenizer.bos_token_id)
        if bos is not None:
            ids[:, 0] = bos
        return TokenRows(ids, RANDOM, len(tokenizer))
    found, packed, order = _drawn(documents(data, split), tokenizer, samples, length, generator)
    rows = TokenRows(packed[order[:samples]], found.source, len(tokenizer))
    notes = []
    if len(packed) < samples:
        notes.append(
            f"{found.source} fills only {len(packed)} rows of {length} tokens, fewer than the requested {samples}"
        )
    if rows.vocabulary_share < SCARCE:
        notes.append(
            f"the calibration rows contain only {rows.vocabulary_share:.1%} of the {rows.vocabulary:,} tokens of the "
            "vocabulary: more samples or more varied text cover more"
        )
    return replace(rows, notes=tuple(notes))


def held_out_rows(
    data: str, tokenizer: PreTrainedTokenizerBase, used: tuple[int, int] | None, length: int, count: int, seed: int = 0
) -> TokenRows | None:
    """At least `count` rows of at most `length` tokens that `calibration_rows` did not give for the same data and seed.

    `used` is its number of samples and their length; None if nothing was calibrated. If the text has no other tokens, the rows
    are some of those that were used, and `held_out` is false. None for random tokens, which are not text.

    Raises what `documents` and `pack` raise.
    """
    if data == RANDOM:
        return None
    samples, row = used or (0, length)
    generator = torch.Generator().manual_seed(seed)
    found, packed, order = _drawn(documents(data, "calibration"), tokenizer, max(samples, 1), row, generator)
    wanted = count * length
    rest = packed[order[samples:]].flatten()
    if len(rest) < wanted and found.join == BOS:
        first = len(stream(found, tokenizer, max(samples, 1) * row))
        rest = torch.cat([rest, stream(found, tokenizer, first + wanted)[first:]])
    held_out = len(rest) >= 2
    tokens = (rest if held_out else packed.flatten())[:wanted]
    length = min(length, len(tokens))
    return TokenRows(windows(tokens, length, length, found.source), found.source, len(tokenizer), held_out=held_out)


def _drawn(
    found: Documents, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, generator: torch.Generator
) -> tuple[Documents, Tensor, Tensor]:
    """The documents in the order in which they are read, all rows of those that are read, and the order of the rows."""
    if found.join == BOS:
        order = torch.randperm(len(found.texts), generator=generator).tolist()
        found = Documents([found.texts[i] for i in order], found.source, found.join)
    packed = pack(found, tokenizer, length, rows=samples)
    return found, packed, torch.randperm(len(packed), generator=generator)


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int, rows: int | None = None) -> Tensor:
    """The packed stream cut into consecutive rows, int64 `[rows, length]`; an incomplete last row is dropped.

    With `rows`, tokenising stops once that many rows are filled; the result may have more. Raises `CompressError` if the text
    does not fill a single row, and `UsageError` if `length` is less than 2.
    """
    tokens = stream(documents, tokenizer, None if rows is None else rows * length)
    return windows(tokens, length, length, documents.source)


def windows(tokens: Tensor, length: int, stride: int, source: str) -> Tensor:
    """Every complete window of the stream `[tokens]`, one every `stride` tokens: `[windows, length]` (a view).

    Raises `UsageError` if `length` is less than 2, and `CompressError` if the stream is shorter than one window.
    """
    if length < 2:
        raise UsageError(f"the row length must be at least 2 (a token and its successor), got {length}")
    if len(tokens) < length:
        raise CompressError(
            f"{source} is too short: it has {len(tokens)} tokens, and one row needs {length}",
            "give more text or a smaller --seq-len",
        )
    return tokens.unfold(0, length, stride)


def stream(documents: Documents, tokenizer: PreTrainedTokenizerBase, enough: int | None = None) -> Tensor:
    """All documents as one stream of ids, int64 `[tokens]`.

    Each separate document starts with exactly one BOS token (with none if the tokenizer has none), whatever the tokenizer
    itself would add. Joined texts are tokenised once, with the tokenizer's own special tokens, as in publications.
    With `enough`, tokenising of separate documents stops once there are that many tokens.
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
    """The ids of each text, preceded by the tokenizer's BOS token if it has one and the text does not start with it."""
    bos = cast(int | None, tokenizer.bos_token_id)
    for batch in _batches(texts):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)
        for ids in cast(list[list[int]], encoded["input_ids"]):
            yield ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, in batches that end once they have `BATCH` characters or more."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch

"""The protocol of a perplexity: the exact rows that it was measured on, and one line that describes them."""

import json
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..calibrate.data.documents import BOS, Documents
from ..calibrate.data.token_rows import fingerprint, stream, windows
from ..errors import UsageError
from ..recipes.scheme import CacheScheme

SHORT_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Protocol:
    """Windows of one text: `ids` int64 `[rows, length]`, and `counted` bool `[rows, length - 1]`: the targets that count.

    Target t is the token t + 1 of its row. Every token of the text is a target at most once.
    """

    ids: Tensor
    counted: Tensor
    source: str
    join: str
    bos: str
    stride: int

    @property
    def sha256(self) -> str:
        return fingerprint(self.ids)

    def describe(self, dtypes: list[torch.dtype], cache: CacheScheme | None = None) -> str:
        """The protocol in one line; `dtypes` are those of the models that were run, each listed once, and `cache` is the scheme
        of the first model's packed cache."""
        rows, length = self.ids.shape
        precision = "/".join(dict.fromkeys(SHORT_DTYPES.get(dtype, str(dtype)) for dtype in dtypes))
        return (
            f"ppl[{self.source}, join={self.join}, win={length}, stride={self.stride}, bos={self.bos}, rows={rows}, "
            f"{precision}, {'' if cache is None else f'{cache}, '}per token]"
        )


def prepare(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int, stride: int | None, rows: int | None
) -> Protocol:
    """Windows of `length` tokens, one every `stride` tokens (default: no overlap), the first `rows` of them (default: all).

    All tokens of a row but the first are counted; if windows overlap, the later ones count their last `stride` tokens. The
    incomplete tail of the text is dropped. Raises UsageError if `stride` is not between 1 and `length` or `rows` is below 1,
    CompressError if the text is shorter than one window.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise UsageError(f"--stride must be between 1 and the row length {length}, got {stride}")
    if rows is not None and rows < 1:
        raise UsageError(f"--rows must be at least 1, got {rows}")
    tokens = stream(documents, tokenizer, None if rows is None else length + (rows - 1) * stride)
    ids = windows(tokens, length, stride, documents.source)[:rows]
    counted = torch.ones(len(ids), length - 1, dtype=torch.bool)
    counted[1:, : max(0, length - 1 - stride)] = False
    return Protocol(
        ids, counted, documents.source, _join(documents, tokenizer), _bos(documents, ids, tokenizer), stride
    )


def _join(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> str:
    if documents.join != BOS:
        return json.dumps(documents.join)
    return "bos" if tokenizer.bos_token_id is not None else "none"


def _bos(documents: Documents, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.bos_token_id is None:
        return "none"
    if documents.join == BOS:
        return "per-document"
    return "auto(1)" if ids[0, 0] == tokenizer.bos_token_id else "auto(0)"

"""Perplexity of a model, and its divergence from a base model: both read the same batches in the same order."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibrate.data.documents import documents
from ..calibrate.model.skeleton import context_length
from ..compress.formats.tokenizer import has_tokenizer, load_tokenizer
from ..compress.load import cache_scheme, load
from ..compress.report.progress import Event, Observer, silent
from ..errors import CompressError, UsageError
from ..kernels.cache.cache import PackedCache
from ..recipes.keywords import takes
from ..recipes.options.evaluate import EvaluateOptions
from ..recipes.scheme import CacheScheme
from .protocol import Protocol, prepare

DEFAULT_LENGTH = 2048
TOKENS_PER_BATCH = 4096
TOKENS_PER_SCORE = 1024  # of which the float32 log-probabilities over the vocabulary exist at once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
Model = str | Path | PreTrainedModel


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. Fields about a base are None without one, standard errors are None for a single row.

    `kl` is KL(base || model) in nats per token, `nll_difference` model minus base. Standard errors take the rows as the
    independent unit (tokens of one row are not), and the differences are paired row by row. `cache_bytes` are those of one
    row's packed keys and values at its end, window and scales included, `cache_bytes_base` without packing in the same dtype.
    """

    perplexity: float
    perplexity_stderr: float | None
    tokens: int
    protocol: str
    sha256: str
    tokens_per_second: float
    perplexity_base: float | None = None
    perplexity_base_stderr: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    nll_difference: float | None = None
    nll_difference_stderr: float | None = None
    tokens_per_second_base: float | None = None
    cache_bytes: int | None = None
    cache_bytes_base: int | None = None

    def as_dict(self) -> dict[str, float | int | str]:
        """For JSON: every figure that was measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@takes(EvaluateOptions)
def evaluate(
    model: Model,
    data: str | Path,
    *,
    against: Model | None = None,
    options: EvaluateOptions,
    progress: Observer = silent,
) -> Evaluation:
    """Perplexity of `model` on `data`, and its divergence from `against`, both of which read the same batches.

    The tokenizer is that of `model`. With `kv_bits` (see `load`), or if the checkpoint stores a packed cache, every
    prediction of `model` reads the packed keys and values that it would read in generation, and `against` is by default the
    same model with its cache in full precision.

    Raises `UsageError` if the request is not possible or the models have different vocabularies, `CompressError` for data that
    cannot be used, a missing tokenizer, and logits that are not finite.
    """
    tokenizer = load_tokenizer(_path(model))
    _check_tokenizers(tokenizer, against)
    found = documents(str(data), options.split)
    device, dtype = options.device, DTYPES[options.dtype]
    opened = _opened(model, device, dtype, options.kernel)
    scheme = cache_scheme(opened.config, options.kv_bits, options.kv_window)
    base = opened if against is None and scheme is not None else against
    runners = [_Runner(opened, scheme)] + ([] if base is None else [_Runner(_opened(base, device, dtype))])
    _check_vocabularies(runners)
    length = _row_length(options.seq_len, runners)
    protocol = prepare(found, tokenizer, length, options.stride, options.rows)
    _check_ids(protocol, runners[0])
    with torch.inference_mode(), _evaluation_mode(runners):
        sums = _walk(runners, protocol, options.batch_size or max(1, TOKENS_PER_BATCH // length), progress)
    return _summary(sums, protocol, runners)


class _Runner:
    """A model, how it packs its cache, and the clock of its forward passes."""

    def __init__(self, model: PreTrainedModel, scheme: CacheScheme | None = None) -> None:
        self.model, self.scheme = model, scheme
        self.cache_bytes = self.cache_bytes_dense = 0
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self._passes: list[tuple[int, float]] = []

    def logits(self, ids: Tensor) -> Tensor:
        """Logits `[rows, length, vocabulary]` of `ids` `[rows, length]`, in the model's dtype and on its device."""
        ids = ids.to(self.model.device)
        self._finish()
        start = time.perf_counter()
        logits = self._whole(ids) if self.scheme is None else self._in_steps(ids, self.scheme)
        self._finish()
        self._passes.append((ids.numel(), time.perf_counter() - start))
        return logits

    def _whole(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def _in_steps(self, ids: Tensor, scheme: CacheScheme) -> Tensor:
        """As `_whole`, in steps so that every token reads the cache that it would read if tokens came one by one."""
        cache = PackedCache.of(self.model, scheme)
        first = scheme.window + scheme.step
        parts = [ids[:, :first], *ids[:, first:].split(scheme.step, dim=1)]
        logits = [self.model(input_ids=p, past_key_values=cache, use_cache=True).logits for p in parts if p.numel()]
        self.cache_bytes, self.cache_bytes_dense = cache.nbytes // len(ids), cache.dense_nbytes // len(ids)
        return torch.cat(logits, 1)

    def speed(self) -> float:
        """Tokens read per second; the first pass warms up and counts only when it is the only one."""
        passes = self._passes[1:] or self._passes
        return sum(tokens for tokens, _ in passes) / sum(seconds for _, seconds in passes)

    def _finish(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def _walk(runners: list[_Runner], protocol: Protocol, batch: int, progress: Observer) -> Tensor:
    """Sums over each row's counted tokens, float64 `[figures, rows]`; the figures are those of `_score`."""
    total = len(protocol.ids)
    sums: list[Tensor] = []
    for start in range(0, total, batch):
        ids = protocol.ids[start : start + batch]
        figures = _score([runner.logits(ids)[:, :-1] for runner in runners], ids[:, 1:])
        _check_finite(figures, start)
        sums.append((figures.double() * protocol.counted[start : start + batch]).sum(-1))
        progress(Event("evaluate", block=min(start + batch, total), blocks=total))
    return torch.cat(sums, dim=1)


def _score(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Per token, float32 `[figures, rows, tokens]`: NLL of the model; with a base also its NLL, the KL, agreement.

    `logits` are the model's and perhaps the base's `[rows, tokens, vocabulary]`; `targets` int64 `[rows, tokens]`.
    """
    flat = [each.flatten(0, 1).split(TOKENS_PER_SCORE) for each in logits]
    parts = zip(targets.flatten().split(TOKENS_PER_SCORE), *flat, strict=True)
    scored = [_score_part(list(rest), part).cpu() for part, *rest in parts]
    return torch.cat(scored, dim=1).unflatten(1, targets.shape)


def _score_part(logits: list[Tensor], targets: Tensor) -> Tensor:
    logs = [each.to(logits[0].device, torch.float32).log_softmax(-1) for each in logits]
    chosen = targets.to(logits[0].device).unsqueeze(1)
    figures = [-log.gather(1, chosen).squeeze(1) for log in logs]
    if len(logs) == 2:
        own, base = logs
        # A token that the base rules out (-inf) adds 0, the limit of p log p.
        figures.append((base.exp() * (base - own)).masked_fill_(base == -torch.inf, 0).sum(-1))
        figures.append((own.argmax(-1) == base.argmax(-1)).float())
    return torch.stack(figures)


def _summary(sums: Tensor, protocol: Protocol, runners: list[_Runner]) -> Evaluation:
    counts = protocol.counted.sum(1).double()
    nll = _estimate(sums[0], counts)
    alone = Evaluation(
        perplexity=nll.perplexity,
        perplexity_stderr=nll.perplexity_stderr,
        tokens=int(counts.sum()),
        protocol=protocol.describe([runner.model.dtype for runner in runners], runners[0].scheme),
        sha256=protocol.sha256,
        tokens_per_second=runners[0].speed(),
    )
    if runners[0].scheme is not None:
        cache = {"cache_bytes": runners[0].cache_bytes, "cache_bytes_base": runners[0].cache_bytes_dense}
        alone = replace(alone, **cache)
    if len(runners) == 1:
        return alone
    base, kl = _estimate(sums[1], counts), _estimate(sums[2], counts)
    difference = _estimate(sums[0] - sums[1], counts)
    return replace(
        alone,
        perplexity_base=base.perplexity,
        perplexity_base_stderr=base.perplexity_stderr,
        kl=kl.mean,
        kl_stderr=kl.stderr,
        top1_agreement=_estimate(sums[3], counts).mean,
        nll_difference=difference.mean,
        nll_difference_stderr=difference.stderr,
        tokens_per_second_base=runners[1].speed(),
    )


@dataclass(frozen=True)
class _Estimate:
    """A mean per token and its standard error; for an NLL, also its perplexity (error by the delta method)."""

    mean: float
    stderr: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def perplexity_stderr(self) -> float | None:
        return None if self.stderr is None else self.perplexity * self.stderr


def _estimate(sums: Tensor, counts: Tensor) -> _Estimate:
    """The ratio estimate of the mean per token over rows: their `sums` and token `counts`, both float64 `[rows]`."""
    rows = len(sums)
    mean = sums.sum() / counts.sum()
    if rows < 2:
        return _Estimate(mean.item(), None)
    variance = (sums - mean * counts).square().sum() / (rows - 1)
    return _Estimate(mean.item(), ((variance / rows).sqrt() / counts.mean()).item())


def _path(model: Model) -> str | Path:
    if not isinstance(model, PreTrainedModel):
        return model
    if not model.name_or_path:
        raise CompressError("the model in memory has no tokenizer", "save it with its tokenizer and give the path")
    return model.name_or_path


def _opened(model: Model, device: str, dtype: torch.dtype, kernel: str | None = None) -> PreTrainedModel:
    return model if isinstance(model, PreTrainedModel) else load(model, device, dtype, kernel=kernel)


def _row_length(asked: int | None, runners: list[_Runner]) -> int:
    limits = [limit for runner in runners if (limit := context_length(runner.model.config)) is not None]
    if asked is None:
        return min([DEFAULT_LENGTH, *limits])
    if limits and asked > min(limits):
        raise UsageError(
            f"rows of {asked} tokens exceed the model's context of {min(limits)}", "give a smaller --seq-len"
        )
    return asked


def _check_tokenizers(tokenizer: PreTrainedTokenizerBase, against: Model | None) -> None:
    """Raise `UsageError` if the base has another tokenizer; if it has none, only its vocabulary's size is compared, later."""
    path = against.name_or_path if isinstance(against, PreTrainedModel) else against
    if path and has_tokenizer(path) and load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"the model and its base {path} have different tokenizers: their predictions cannot be compared",
            "give the model that the checkpoint was made from",
        )


def _check_vocabularies(runners: list[_Runner]) -> None:
    sizes = [runner.vocabulary for runner in runners]
    if len(set(sizes)) > 1:
        raise UsageError(
            f"the model has {sizes[0]} tokens and its base {sizes[1]}: their predictions cannot be compared",
            "give the model that the checkpoint was made from",
        )


def _check_ids(protocol: Protocol, runner: _Runner) -> None:
    if int(protocol.ids.max()) >= runner.vocabulary:
        raise CompressError(
            f"the tokenizer returns the token {int(protocol.ids.max())}, the model has {runner.vocabulary}",
            "the tokenizer belongs to another model",
        )


def _check_finite(figures: Tensor, start: int) -> None:
    # Not by position: attention carries a NaN to every place of its row, the masked ones too.
    for name, nll in zip(("model", "base"), figures, strict=False):
        broken = (~nll.isfinite()).any(1).nonzero()
        if len(broken):
            raise CompressError(f"the logits of the {name} are not finite in row {start + int(broken[0])}")


@contextmanager
def _evaluation_mode(runners: list[_Runner]) -> Iterator[None]:
    """Switch the models to evaluation (no dropout), and back afterwards."""
    training = [runner.model for runner in runners if runner.model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()

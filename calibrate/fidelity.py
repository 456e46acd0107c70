"""Fidelity: the predictions of the compressed model against those of the original, measured while a run walks the blocks.

Two streams of hidden states go through the blocks, one through each block as it was and one through what it has become, so
that no more than one block is in memory. At the end the norm and the head turn both into predictions of the next token.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .data.token_rows import TokenRows
from .model.skeleton import assign
from .model.source import Source
from .runner import Runner

TOKENS_AT_ONCE = 128  # whose logits are in memory; no more than a row, which the context holds


@dataclass(frozen=True)
class Fidelity:
    """The result against the original on `tokens` tokens of `source`.

    kl                KL(original || result) of the next token, nats per token
    top1_agreement    share of the tokens for which both predict the same next token
    perplexity        of the result, and `perplexity_base` of the original
    held_out          whether the passes have not seen these tokens
    """

    kl: float
    top1_agreement: float
    perplexity: float
    perplexity_base: float
    tokens: int
    source: str
    held_out: bool

    def as_dict(self) -> dict[str, float | int | str | bool]:
        """For JSON, rounded: the last digits depend on the number of threads."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


class FidelityMeter:
    """Measures the fidelity of a run on `rows`: `capture` first, then `original` and `compressed` for each block, then `read`.

    A block is loaded by the run itself: the meter works with the modules of `model` as they are at each call.
    """

    def __init__(
        self, model: PreTrainedModel, source: Source, rows: TokenRows, scratch: Path, device: str = "cpu"
    ) -> None:
        self._rows = rows
        self._model = model
        self._before = Runner(model, source, rows, scratch / "fidelity-before", device)
        self._after = Runner(model, source, rows, scratch / "fidelity-after", device)
        self._rewritten: Mapping[str, Tensor] = {}

    def capture(self, rewritten: Mapping[str, Tensor]) -> None:
        """Record the first block's inputs. `rewritten` are the parameters outside the blocks that the run has changed, by
        their names in the model."""
        self._rewritten = rewritten
        self._before.capture()
        self._after.capture(rewritten)

    def original(self, index: int) -> None:
        """Run block `index`, which is loaded and as it was."""
        self._before.forward(index)

    def compressed(self, index: int) -> None:
        """Run block `index`, whose weights are those of the result."""
        self._after.forward(index)

    @torch.no_grad()
    def read(self) -> Fidelity:
        """The figures, after the last block."""
        sums, tokens, targets = torch.zeros(4, dtype=torch.float64), 0, 0
        with self._before.readout() as readout:
            for batch, ids in enumerate(self._before.batches):
                before, after = self._before.hidden(batch), self._after.hidden(batch)
                following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1).flatten()
                for part in torch.arange(ids.numel()).split(min(TOKENS_AT_ONCE, ids.shape[1])):
                    given = ids.flatten()[part].unsqueeze(0)
                    base = readout(given, before.flatten(0, 1)[part])
                    with _assigned(self._model, self._rewritten):
                        found = readout(given, after.flatten(0, 1)[part])
                    sums += _compare(base, found, following[part].to(base.device))
                    tokens, targets = tokens + len(part), targets + int((following[part] >= 0).sum())
        kl, agreement, loss, loss_base = sums.tolist()
        return Fidelity(
            kl=max(kl / tokens, 0.0),
            top1_agreement=agreement / tokens,
            perplexity=exp(min(loss / targets, 700.0)),
            perplexity_base=exp(min(loss_base / targets, 700.0)),
            tokens=tokens,
            source=self._rows.source,
            held_out=self._rows.held_out,
        )


def _compare(base: Tensor, found: Tensor, following: Tensor) -> Tensor:
    """Sums over the tokens of the divergence, of equal best tokens, and of both losses on the tokens `following` (-1: unknown).

    Logits that are not finite count as a prediction of nothing: the divergence is that of a uniform distribution.
    """
    logp = base.float().log_softmax(-1)
    logq = found.float().nan_to_num(0.0, 0.0, 0.0).log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    same = logp.argmax(-1) == logq.argmax(-1)
    known = following >= 0
    targets = following[known].unsqueeze(1)
    losses = [-logs[known].gather(1, targets) for logs in (logq, logp)]
    return torch.stack([each.double().sum() for each in (kl, same, *losses)]).cpu()


@contextmanager
def _assigned(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other parameters while the context lasts."""
    held = {name: model.get_parameter(name).detach() for name in tensors}
    for name, tensor in tensors.items():
        assign(model, name, tensor.to(held[name].device))
    try:
        yield
    finally:
        for name, tensor in held.items():
            assign(model, name, tensor)

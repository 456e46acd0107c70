"""Short rows of random tokens, the input of the experiments on blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.token_rows import TokenRows
from ..model.source import Source
from ..runner import Call, Runner

# Experiments compare the first token of each row; the later tokens are there so that attention has an effect.
ROWS, LENGTH = 16, 4


class Probe:
    """Short rows of random tokens, and the arguments with which the model calls each of its blocks on them."""

    def __init__(self, model: PreTrainedModel, source: Source, scratch: Path, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.get_text_config().vocab_size, (ROWS, LENGTH), generator=generator)
        self._ids = ids
        self._runner = Runner(model, source, TokenRows(ids, "random tokens", ids.numel()), scratch, device)
        self._runner.capture()

    @contextmanager
    def outside(self) -> Iterator[tuple[PreTrainedModel, Tensor]]:
        """The model with its blocks replaced by the identity, and the probe's token ids int64 `[ROWS, LENGTH]`."""
        with self._runner.without_blocks() as model:
            yield model, self._ids.to(self._runner.device)

    def experiment(self, index: int) -> tuple[Call, Tensor]:
        """The call arguments of block `index`, and random hidden states `[ROWS, LENGTH, width]` for it."""
        (call, hidden, _), *_ = self._runner.samples(index)
        generator = torch.Generator().manual_seed(index)
        return call, torch.randn(hidden.shape, generator=generator).to(hidden)

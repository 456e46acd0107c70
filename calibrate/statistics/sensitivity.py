"""How much the predictions of a model change if a single layer is changed, measured as KL divergence."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.architecture import set_weight, weight_of


class Sensitivity:
    """Compares `model`, all of which is in memory, with itself on the rows `ids` `[rows, length]` (`mask`: real tokens).

    It holds the log-probabilities of all those tokens, `rows * length * vocabulary` numbers: a few thousand tokens are enough
    to rank layers.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> None:
        self._model, self._ids, self._mask = model, ids, mask
        self._base = [self._predictions(row) for row in range(len(ids))]

    @torch.no_grad()
    def loss(self, layer: str, weight: Tensor) -> float:
        """KL(model || changed model) in nats per token, with `weight` `[out, in]` in the linear layer `layer`."""
        module = self._model.get_submodule(layer)
        original = weight_of(module).clone()
        set_weight(module, weight)
        try:
            found = [self._predictions(row) for row in range(len(self._ids))]
        finally:
            set_weight(module, original)
        gaps = [(base.exp() * (base - other)).sum(-1).double() for base, other in zip(self._base, found, strict=True)]
        return float(torch.cat(gaps).mean())

    @torch.no_grad()
    def energies(self, layers: Mapping[str, object]) -> dict[str, Tensor]:
        """The sum of squares over the rows of every input of the linear `layers`: float32 `[in]` by name."""
        found: dict[str, Tensor] = {}

        def note(name: str):  # noqa: ANN202
            def gather(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                squares = args[0].detach().float().flatten(0, -2).square().sum(0)
                found[name] = found[name] + squares if name in found else squares

            return gather

        handles = [self._model.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers]
        try:
            for row in range(len(self._ids)):
                self._predictions(row)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @torch.no_grad()
    def _predictions(self, row: int) -> Tensor:
        """Log-probabilities `[tokens, vocabulary]` at the real tokens of a row."""
        device = self._model.device
        ids = self._ids[row : row + 1].to(device)
        mask = None if self._mask is None else self._mask[row : row + 1].to(device)
        logits = self._model(ids, attention_mask=mask, use_cache=False).logits[0].float()
        return (logits if mask is None else logits[mask[0].bool()]).log_softmax(-1)

"""The statistic that lets a layer repair what the layers before it broke: how far its output has drifted, seen by its inputs.

A linear that reads the inputs `X` of the compressed model should not imitate `X W^T` but what the original model has at
that place, `S_ref`. With `S` what the compressed model would have there with the layer's own weight untouched, the least
squares answer is `W + G Hd^-1`, `G = 2/N * (S_ref - S)^T X`. This is the asymmetric term of GPTAQ (Li et al. 2025), with one
difference that matters more than the term itself: where the output is added to the residual stream, `S` is the stream
after the addition, so that the layer makes up for the drift of everything that was added before it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .hessian import Statistic

ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


class Drift(Statistic):
    """Streaming `G = 2/N * (S_ref - S)^T X` `[out, in]` of one linear layer."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__(rows, columns, dtype, device)
        self._done = False

    def update(self, lacking: Tensor, inputs: Tensor, sequences: int) -> None:
        """Add the tokens of `sequences` rows: `lacking` `S_ref - S` `[tokens, out]`, `inputs` `X` `[tokens, in]`."""
        assert not self._done
        self._sum.addmm_(lacking.to(self._sum.dtype).T, inputs.to(self._sum.dtype))
        self.sequences += sequences
        self.tokens += inputs.shape[0]

    def matrix(self) -> Tensor:
        """`G` `[out, in]`: the statistic's own memory, to be read only. From then on nothing more can be added."""
        if not self._done:
            self._sum.mul_(2 / max(self.sequences, 1))
            self._done = True
        return self._sum


@contextmanager
def residual_targets(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each linear's output lands in while the context is open: the sum it is first added into, or the output itself.

    Found by following tensors through the forward pass, not by the names of an architecture.
    """
    found: dict[str, Tensor] = {}

    def output(name: str) -> Any:
        return lambda module, args, result: found.__setitem__(name, result)

    hooks = [module.register_forward_hook(output(name)) for name, module in linears.items()]
    try:
        with _Following(found):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Following(TorchFunctionMode):
    """Replaces a linear's output by the sum when the two of them are added, once."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self._found = found
        self._landed: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ADDITIONS:
            for name, tensor in self._found.items():
                operand = any(tensor is a for a in args)
                if operand and name not in self._landed and result.shape == tensor.shape:
                    self._found[name] = result
                    self._landed.add(name)
        return result

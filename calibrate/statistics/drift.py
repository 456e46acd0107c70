"""The statistic of asymmetric calibration (GPTAQ): it lets a layer compensate the errors of the layers before it.

A linear that reads the inputs `X` of the compressed model should not reproduce `X W^T`, but the original model's output at
that point, `S_ref`. Let `S` be the compressed model's output there with this layer's own weight unchanged. The difference
`S_ref - S` is the drift, and the least squares solution is `W + G Hd^-1` with `G = 2/N * (S_ref - S)^T X`. This is the
asymmetric term of GPTAQ (Li et al. 2025), with one difference that has more effect than the term itself: if the output is
added to the residual stream, `S` is the stream after the addition, so that the layer also compensates the drift of everything
that was added before.
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
    """Streaming `G = 2/N * (S_ref - S)^T X` `[out, in]` of one linear layer, for N calibration rows."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__(rows, columns, dtype, device)
        self._done = False

    def update(self, difference: Tensor, inputs: Tensor, sequences: int) -> None:
        """Add the tokens of `sequences` rows: `difference` `S_ref - S` `[tokens, out]`, `inputs` `X` `[tokens, in]`."""
        assert not self._done
        self._sum.addmm_(difference.to(self._sum.dtype).T, inputs.to(self._sum.dtype))
        self.sequences += sequences
        self.tokens += inputs.shape[0]

    def matrix(self) -> Tensor:
        """`G` `[out, in]`, in the statistic's own memory: do not modify it. After the first call nothing can be added."""
        if not self._done:
            self._sum.mul_(2 / max(self.sequences, 1))
            self._done = True
        return self._sum


@contextmanager
def residual_targets(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The residual target of each linear while the context is open: the first sum that its output is added into (the residual
    stream after the addition), or the output itself if it is not added to anything.

    Found by following tensors through the forward pass, not by the module names of an architecture.
    """
    found: dict[str, Tensor] = {}

    def output(name: str) -> Any:
        return lambda module, args, result: found.__setitem__(name, result)

    hooks = [module.register_forward_hook(output(name)) for name, module in linears.items()]
    try:
        with _FollowAdditions(found):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


class _FollowAdditions(TorchFunctionMode):
    """Replaces a linear's output in `found` by the first sum that it is an operand of."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self._found = found
        self._replaced: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ADDITIONS:
            for name, tensor in self._found.items():
                operand = any(tensor is a for a in args)
                if operand and name not in self._replaced and result.shape == tensor.shape:
                    self._found[name] = result
                    self._replaced.add(name)
        return result

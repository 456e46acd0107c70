"""What compressed weights of every kind have in common (see `recipes/scheme/kinds.py`)."""

from typing import Protocol, Self

import torch
from torch import Tensor

from ...recipes.scheme import QuantArgs, WeightArgs


class Compressed(Protocol):
    """What a pass leaves in place of a weight: a frozen dataclass of tensors and arguments."""

    @property
    def args(self) -> WeightArgs:
        """How it was compressed."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same on `device`."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        ...


class Quantized(Compressed, Protocol):
    """A compressed weight whose arguments are those of codes."""

    @property
    def args(self) -> QuantArgs:
        """How it was quantized."""
        ...

"""A low-rank term added to a quantized weight."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...recipes.scheme import QuantArgs
from .protocol import Quantized


@dataclass(frozen=True)
class LowRankTensor:
    """A quantized weight `[out, in]` with most of its error as a product of two narrow matrices: `base + left @ right`.

    left   float16 `[out, rank]`
    right  float16 `[rank, in]`
    """

    base: Quantized
    left: Tensor
    right: Tensor

    @property
    def args(self) -> QuantArgs:
        """The arguments of the base, with the rank."""
        return replace(self.base.args, rank=self.left.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.base.shape

    def to(self, device: torch.device | str) -> "LowRankTensor":
        """The same on `device`."""
        return LowRankTensor(self.base.to(device), self.left.to(device), self.right.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        return self.base.dequantize(dtype).addmm_(self.left.to(dtype), self.right.to(dtype))

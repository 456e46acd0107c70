"""A term of low rank beside a quantized weight."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...recipes.scheme import QuantArgs
from .bilevel import SpQRTensor
from .gguf_blocks import BlockTensor
from .integer import CompressedTensor
from .nf4 import NF4Tensor
from .outlier_columns import MixedTensor

Quantized = CompressedTensor | BlockTensor | SpQRTensor | NF4Tensor | MixedTensor


@dataclass(frozen=True)
class LowRankTensor:
    """A quantized weight with what it lacks most, as a product of two narrow matrices: `base + left @ right`, `[out, in]`.

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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        return self.base.dequantize(dtype).addmm_(self.left.to(dtype), self.right.to(dtype))

"""LLM.int8: 8 bits, and 16 for the input columns with outlier values."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...recipes.scheme import QuantArgs
from .integer import CompressedTensor
from .parts import moved


@dataclass(frozen=True)
class OutlierColumnsTensor:
    """A weight matrix `[out, in]` in 8 bits with some input columns in 16 (LLM.int8), for inputs that are quantized too.

    codes    uint8 `[out, in]`, those of the 16-bit columns among them: other runtimes have only these
    scale    float `[out, 1]`: `scale * (codes - 128)`
    columns  int64 `[kept]`, ascending, and `outliers` float16 `[out, kept]`, their weights
    inputs   a dynamic scale per token; columns that reach its threshold are not quantized
    """

    codes: Tensor
    scale: Tensor
    columns: Tensor
    outliers: Tensor
    args: QuantArgs
    inputs: QuantArgs

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def grid(self) -> CompressedTensor:
        """The 8-bit part alone, which covers all columns."""
        return CompressedTensor(self.codes, self.scale, None, replace(self.args, outliers=0.0))

    def to(self, device: torch.device | str) -> "OutlierColumnsTensor":
        """The same on `device`."""
        return moved(self, device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        return self.grid.dequantize(dtype).index_copy_(1, self.columns, self.outliers.to(dtype))

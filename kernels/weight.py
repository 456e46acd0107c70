"""What a kernel is given: one layer's quantized weight, in no kernel's layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compress.tensor import CompressedTensor


@dataclass(frozen=True)
class Weight:
    """A weight `[out, in]`: `scale * (codes - zero)`, or `scale * codebook[codes]`, plus what was kept apart.

    codes     uint8 `[out, in]`, below `2**bits`
    scale     float `[out, groups]`; group g covers the columns `g * group ..`, the last group may be shorter
    zero      `[out, groups]`, integers or reals; None where it is `2**(bits - 1)`, and with a codebook
    codebook  float `[2**bits]`, or None for a uniform grid
    columns, outliers  the indices int64 `[c]` of input columns kept in high precision, and their weights `[out, c]`; the
              codes of these columns do not count
    residual  sparse CSR `[out, in]` that is added to the rest (SpQR), or None
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    codebook: Tensor | None = None
    columns: Tensor | None = None
    outliers: Tensor | None = None
    residual: Tensor | None = None

    @classmethod
    def of(cls, tensor: CompressedTensor) -> "Weight":
        """The weight of a compressed tensor."""
        args = tensor.args
        return cls(tensor.codes, tensor.scale, tensor.zero, args.bits, args.columns_per_scale(tensor.shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` computed in `dtype`: what every kernel is held against."""
        width = self.codes.shape[1]
        scale = self.scale.to(dtype).repeat_interleave(self.group, dim=1)[:, :width]
        if self.codebook is not None:
            values = self.codebook.to(dtype)[self.codes.int()]
        elif self.zero is None:
            values = self.codes.to(dtype) - 2 ** (self.bits - 1)
        else:
            values = self.codes.to(dtype) - self.zero.to(dtype).repeat_interleave(self.group, dim=1)[:, :width]
        dense = values * scale
        if self.columns is not None and self.outliers is not None:
            dense[:, self.columns] = self.outliers.to(dtype)
        if self.residual is not None:
            dense += self.residual.to_dense().to(dtype)
        return dense

"""CompressedTensor: what a pass leaves in place of a weight. Formats write it, kernels serve it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid, dequantize
from .scheme import PruneArgs, QuantArgs


@dataclass(frozen=True)
class CompressedTensor:
    """A quantized weight matrix `[out, in]`: `dequantized = scale * (codes - zero)`.

    codes  uint8 `[out, in]`, values `0 .. 2**bits - 1`
    scale  `args.scale_dtype` `[out, groups]` (one group per row for channel and tensor grids)
    zero   uint8 `[out, groups]`, or None where the grid is symmetric (then it is `2**(bits - 1)`)
    args   the grid's description, its group size resolved for this width
    inputs how the layer's inputs are quantized, or None; `input_scale` `[1]` is their scale where it is static
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    args: QuantArgs
    inputs: QuantArgs | None = None
    input_scale: Tensor | None = None

    @classmethod
    def from_grid(cls, codes: Tensor, grid: Grid) -> "CompressedTensor":
        """Join the codes `[out, in]` and the grid that gave them."""
        rows = codes.shape[0]
        scale = grid.scale.to(grid.args.torch_scale_dtype).expand(rows, -1).contiguous()
        zero = None if grid.args.symmetric else grid.zero.to(torch.uint8).expand(rows, -1).contiguous()
        return cls(codes.to(torch.uint8), scale, zero, grid.args)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        zero = 2 ** (self.args.bits - 1) if self.zero is None else self.zero.to(dtype)
        scale = self.scale.to(dtype)
        return dequantize(self.codes, scale, torch.as_tensor(zero, dtype=dtype).expand_as(scale))


@dataclass(frozen=True)
class PrunedTensor:
    """A pruned weight matrix `[out, in]`.

    values  in `args.dtype` `[out, in]`, zero where pruned
    kept    bool `[out, in]`: what is stored, whether or not it happens to be zero
    args    what was asked for, resolved for this layer
    """

    values: Tensor
    kept: Tensor
    args: PruneArgs

    @classmethod
    def of(cls, weight: Tensor, pruned: Tensor, args: PruneArgs) -> "PrunedTensor":
        """Round `weight` `[out, in]` to the stored dtype and clear what is `pruned` (bool `[out, in]`)."""
        assert args.dtype is not None
        return cls(weight.masked_fill(pruned, 0).to(getattr(torch, args.dtype)), ~pruned, args)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, in `dtype`."""
        return self.values.to(dtype)

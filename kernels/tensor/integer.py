"""Integer codes on a grid of scales and zeros."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import CompressError
from ...recipes.scheme import QuantArgs
from .grid import Grid, dequantize
from .parts import moved

InputGrid = tuple[Tensor, Tensor]  # scale and zero of a layer's inputs


@dataclass(frozen=True)
class CompressedTensor:
    """A quantized weight matrix `[out, in]`: `dequantized = scale * (codes - zero)`.

    codes  uint8 `[out, in]`, values `0 .. 2**bits - 1`
    scale  `args.scale_dtype` `[out, groups]` (one group per row for channel and tensor grids)
    zero   uint8 `[out, groups]`, or None if the grid is symmetric (then it is `2**(bits - 1)`)
    args   the grid's description, its group size resolved for this width
    inputs how the layer's inputs are quantized, or None; if they are static, `input_grid` holds their scale
           (`inputs.scale_dtype`) and zero (float32), both `[1]`
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    args: QuantArgs
    inputs: QuantArgs | None = None
    input_grid: InputGrid | None = None

    @classmethod
    def from_grid(cls, codes: Tensor, grid: Grid) -> "CompressedTensor":
        """Join the codes `[out, in]` and the grid that gave them."""
        rows = codes.shape[0]
        scale = grid.scale.to(grid.args.torch_scale_dtype).expand(rows, -1).contiguous()
        if not grid.args.symmetric and bool(((grid.zero < 0) | (grid.zero > grid.args.maxq)).any()):
            raise CompressError(
                f"a zero of the {grid.args.formula!r} grid does not fit {grid.args.bits} bits", "use --set formula=gptq"
            )
        zero = None if grid.args.symmetric else grid.zero.to(torch.uint8).expand(rows, -1).contiguous()
        return cls(codes.to(torch.uint8), scale, zero, grid.args)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device | str) -> "CompressedTensor":
        """The same on `device`."""
        grid = None if self.input_grid is None else (self.input_grid[0].to(device), self.input_grid[1].to(device))
        return replace(moved(self, device), input_grid=grid)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        zero = 2 ** (self.args.bits - 1) if self.zero is None else self.zero.to(dtype)
        scale = self.scale.to(dtype)
        return dequantize(self.codes, scale, torch.as_tensor(zero, dtype=dtype, device=scale.device).expand_as(scale))


def joined(tensors: Sequence[CompressedTensor]) -> CompressedTensor:
    """One weight out of runs of its rows, which share their arguments."""
    zeros = [tensor.zero for tensor in tensors if tensor.zero is not None]
    return replace(
        tensors[0],
        codes=torch.cat([tensor.codes for tensor in tensors]),
        scale=torch.cat([tensor.scale for tensor in tensors]),
        zero=torch.cat(zeros) if zeros else None,
    )

"""SpQR: codes whose scales and zeros are quantized too, and a sparse residual."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...recipes.scheme import QuantArgs
from .grid import Grid, encode, parameters

TILE = 16  # output rows that share one second-level grid (SpQR)
LEVEL = QuantArgs(bits=3, symmetric=False, strategy="channel", group_size=None, formula="spqr")  # of scales and zeros
CONSTANT = 2**-9  # a spread below this share of the values is none: its zero would leave the range of float16


@dataclass(frozen=True)
class Bilevel:
    """One number per row and group, itself quantized to `LEVEL.bits` bits in tiles of 16 rows (SpQR's second level).

    codes  uint8 `[out, groups]`
    scale, zero  float16 `[ceil(out / 16), groups]`: `value = scale * (code - zero)`
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def fit(cls, values: Tensor) -> "Bilevel":
        """Quantize `values` `[out, groups]`; the last tile is filled up with the last row, which widens no range."""
        rows = len(values)
        padded = torch.cat([values, values[-1:].expand(-rows % TILE, -1)])
        tiles = padded.unflatten(0, (-1, TILE)).transpose(1, 2)  # [tiles, groups, 16]
        low, high = tiles.amin(-1), tiles.amax(-1)
        flat = high - low <= CONSTANT * torch.maximum(low.abs(), high.abs())
        middle = (low + high) / 2
        scale, zero = parameters(torch.where(flat, middle, low), torch.where(flat, middle, high), LEVEL)
        zero = zero.half().to(scale.dtype)
        codes = encode(tiles, scale.unsqueeze(-1), zero.unsqueeze(-1), LEVEL)
        codes = codes.transpose(1, 2).flatten(0, 1)[:rows].to(torch.uint8)
        return cls(codes, scale.half(), zero.half())

    def to(self, device: torch.device | str) -> "Bilevel":
        """The same on `device`."""
        return Bilevel(self.codes.to(device), self.scale.to(device), self.zero.to(device))

    def values(self, dtype: torch.dtype) -> Tensor:
        """The numbers that are served `[out, groups]`, computed in `dtype`."""
        rows = len(self.codes)
        scale, zero = (t.to(dtype).repeat_interleave(TILE, 0)[:rows] for t in (self.scale, self.zero))
        return (self.codes.to(dtype) - zero) * scale


@dataclass(frozen=True)
class SpQRTensor:
    """Codes with bilevel scales and zeros, plus a sparse residual: `scale * (codes - zero) + residual`, `[out, in]`.

    codes    uint8 `[out, in]`; groups of `args.group_size` columns, the last one may be shorter
    counts   int64 `[out]`, entries of the residual per row
    columns  int64 `[entries]`, row after row
    values   float16 `[entries]`: the error of the dense part, so that the sum of both is what was evaluated
    """

    codes: Tensor
    scale: Bilevel
    zero: Bilevel
    counts: Tensor
    columns: Tensor
    values: Tensor
    args: QuantArgs

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device | str) -> "SpQRTensor":
        """The same on `device`."""
        residual = (self.counts.to(device), self.columns.to(device), self.values.to(device))
        return SpQRTensor(self.codes.to(device), self.scale.to(device), self.zero.to(device), *residual, self.args)

    def grid(self, dtype: torch.dtype = torch.float32) -> Grid:
        """The served scales and real zeros `[out, groups]`."""
        return Grid(self.scale.values(dtype), self.zero.values(dtype), self.args)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense part alone."""
        grid, width = self.grid(dtype), self.codes.shape[1]
        size = self.args.columns_per_scale(width)
        scale, zero = (t.repeat_interleave(size, 1)[:, :width] for t in (grid.scale, grid.zero))
        return (self.codes.to(dtype) - zero) * scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        weight = self.dense(dtype)
        rows = torch.arange(len(self.counts), device=self.codes.device).repeat_interleave(self.counts)
        weight[rows, self.columns] += self.values.to(dtype)
        return weight

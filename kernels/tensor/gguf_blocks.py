"""GGUF's blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...recipes.scheme import QuantArgs
from .grid import Grid
from .parts import moved


@dataclass(frozen=True)
class BlockTensor:
    """A weight matrix `[out, in]` in GGUF's blocks: `scale * codes - minimum`, or `scale * (codes - 2**(bits - 1))`.

    codes    uint8 `[out, in]`
    unit     float16 `[out, blocks]`: a group's scale is its unit times its factor, or the unit itself if blocks are groups
    factors  int8 `[out, groups]`, never 0; None if blocks are groups
    least    float16 `[out, blocks]` and `minima` uint8 `[out, groups]`: the minimum likewise; None if it is symmetric
    """

    codes: Tensor
    unit: Tensor
    factors: Tensor | None
    least: Tensor | None
    minima: Tensor | None
    args: QuantArgs

    @classmethod
    def from_grid(cls, codes: Tensor, grid: Grid) -> "BlockTensor":
        """Join the codes `[out, in]` and the super-blocks that gave them."""
        assert grid.units is not None
        factors, minima = grid.units.factors(grid.scale, grid.scale * grid.zero, grid.args)
        least = None if grid.units.minimum is None else grid.units.minimum.half()
        minima = None if minima is None else minima.to(torch.uint8)
        return cls(codes.to(torch.uint8), grid.units.scale.half(), factors.to(torch.int8), least, minima, grid.args)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // (self.unit if self.factors is None else self.factors).shape[1]

    def scales(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of every group, `[out, groups]`; exact in float32."""
        return _times(self.unit, self.factors, dtype)

    def minimums(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Of every group, `[out, groups]`; exact in float32. None if it is symmetric."""
        return None if self.least is None else _times(self.least, self.minima, dtype)

    def zeros(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The minima in steps, real numbers `[out, groups]`; None if it is symmetric."""
        minimum = self.minimums(dtype)
        return None if minimum is None else minimum / self.scales(dtype)

    def to(self, device: torch.device | str) -> "BlockTensor":
        """The same on `device`."""
        return moved(self, device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`; float32 rounds once, as llama.cpp does."""
        scale, minimum = self.scales(dtype).unsqueeze(-1), self.minimums(dtype)
        codes = self.codes.unflatten(1, (scale.shape[1], -1)).to(dtype)
        if minimum is None:
            return ((codes - 2 ** (self.args.bits - 1)) * scale).flatten(1)
        return (codes * scale - minimum.unsqueeze(-1)).flatten(1)


def _times(unit: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    if factors is None:
        return unit.to(dtype)
    return unit.to(dtype).repeat_interleave(factors.shape[1] // unit.shape[1], 1) * factors.to(dtype)

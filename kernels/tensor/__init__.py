"""What a pass leaves in place of a weight: one of the kinds of `Compressed`. Formats write it, kernels serve it."""

from torch import Tensor

from .bilevel import LEVEL, TILE, Bilevel, SpQRTensor
from .gguf_blocks import BlockTensor
from .grid import Grid
from .integer import CompressedTensor, InputGrid, joined
from .low_rank import LowRankTensor, Quantized
from .nf4 import NF4Tensor
from .outlier_columns import MixedTensor
from .parts import parts, settings
from .pruned import PrunedTensor

__all__ = [
    "LEVEL",
    "TILE",
    "Bilevel",
    "BlockTensor",
    "Compressed",
    "CompressedTensor",
    "InputGrid",
    "LowRankTensor",
    "MixedTensor",
    "NF4Tensor",
    "PrunedTensor",
    "Served",
    "SpQRTensor",
    "joined",
    "of_grid",
    "parts",
    "settings",
]

Compressed = Quantized | PrunedTensor | LowRankTensor
Served = CompressedTensor | BlockTensor | NF4Tensor | MixedTensor  # those whose codes a kernel multiplies


def of_grid(codes: Tensor, grid: Grid) -> "CompressedTensor | BlockTensor":
    """What stores the codes `[out, in]` of a `grid`."""
    return (CompressedTensor if grid.units is None else BlockTensor).from_grid(codes, grid)

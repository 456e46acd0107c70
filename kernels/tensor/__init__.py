"""What a pass leaves in place of a weight: an instance of `Compressed`. Formats store it, kernels multiply by it."""

from torch import Tensor

from .bilevel import LEVEL, TILE, Bilevel, SpQRTensor
from .gguf_blocks import BlockTensor
from .grid import Grid
from .integer import CompressedTensor, InputGrid, joined
from .low_rank import LowRankTensor
from .nf4 import NF4Tensor
from .outlier_columns import OutlierColumnsTensor
from .parts import parts, settings
from .protocol import Compressed, Quantized
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
    "NF4Tensor",
    "OutlierColumnsTensor",
    "PrunedTensor",
    "Quantized",
    "SpQRTensor",
    "joined",
    "of_grid",
    "parts",
    "settings",
]


def of_grid(codes: Tensor, grid: Grid) -> "CompressedTensor | BlockTensor":
    """What stores the codes `[out, in]` of a `grid`."""
    return (CompressedTensor if grid.units is None else BlockTensor).from_grid(codes, grid)

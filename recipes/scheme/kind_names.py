"""The names of the kinds of compressed weights."""

from typing import Final

from .quant_args import Kind

GRID: Final[Kind] = "grid"
BILEVEL: Final[Kind] = "two-level"
NF4: Final[Kind] = "nf4"
OUTLIER_COLUMNS: Final[Kind] = "columns"
GGUF_BLOCKS: Final[Kind] = "blocks"
LOW_RANK: Final[Kind] = "low-rank"
PRUNED: Final = "pruned"

"""The names of the kinds of compressed weights that lmpress comes with (see `kinds.py`)."""

from typing import Final

GRID: Final = "grid"
BILEVEL: Final = "bilevel"
NF4: Final = "nf4"
OUTLIER_COLUMNS: Final = "outlier_columns"
GGUF_BLOCKS: Final = "gguf_blocks"
LOW_RANK: Final = "low_rank"
PRUNED: Final = "pruned"

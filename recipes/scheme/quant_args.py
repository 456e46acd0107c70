"""How one tensor is quantized, as a value.

Field names follow compressed-tensors where it has one. All validation of bits, groups and grids lives here.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ...errors import UsageError
from .prune_args import FloatDtype

if TYPE_CHECKING:
    import torch

Strategy = Literal["tensor", "channel", "group", "flat", "token"]
Formula = Literal["gptq", "signed", "ds", "awq", "spqr", "nf4", "ggml"]
STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group", "token")  # of grids; a codebook's blocks are `flat`
Observer = Literal["minmax", "mse", "percentile", "average"]
ScaleDtype = Literal["float16", "bfloat16", "float32", "bilevel", "nested", "super"]
Kind = Literal["grid", "two-level", "nf4", "columns", "low-rank", "blocks"]

# The named grids of the literature: which formulas exist in a symmetric and which in an asymmetric form.
GRIDS: dict[Formula, tuple[bool, ...]] = {
    "gptq": (True, False),
    "signed": (True,),
    "ds": (True, False),
    "awq": (False,),
    "spqr": (False,),
    "nf4": (True,),
    "ggml": (True, False),
}
REAL_ZEROS: tuple[Formula, ...] = ("spqr", "ggml")  # formulas whose zeros are no integers
FLAT_SIZES = tuple(2**n for n in range(5, 13))  # blocks that bitsandbytes knows

# GGUF's blocks: (bits, symmetric, group size). K-quants have scales that are whole multiples of a float16 per 256 columns; rows
# that no such super-block fills get the plain block that llama.cpp gives them.
SUPER_BLOCK, PLAIN_BLOCK = 256, 32
K_QUANTS: dict[str, tuple[int, bool, int]] = {"Q4_K": (4, False, 32), "Q6_K": (6, True, 16)}
PLAIN_BLOCKS: dict[str, tuple[int, bool, int]] = {
    **{f"Q{bits}_0": (bits, True, PLAIN_BLOCK) for bits in (4, 5, 8)},
    **{f"Q{bits}_1": (bits, False, PLAIN_BLOCK) for bits in (4, 5)},  # read, not solved: their minima are float16
}
IN_PLACE_OF = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QuantArgs:
    """One tensor's grid: `dequantized = scale * (code - zero)`, `code` in `0 .. 2**bits - 1`; `scale * NF4[code]` for `nf4`.

    `strategy` says which values share a scale: the whole tensor, an output row (`channel`), `group_size` neighbouring
    input columns of a row (`group`), as many of the flattened matrix (`flat`), or a row of activations (`token`). `formula`
    picks the published definition of scale and zero (see `grid.py`), `observer` how the range is found (`percentile`: what so
    many hundredths of the values stay below; see `quantize/observers.py`), `scale_dtype` how the scale is stored: as a float,
    or quantized itself (`bilevel`, `nested`, `super`, see `tensor/`). `outliers` is the share of weights that keep a 16-bit
    residual (`bilevel`), or of input columns that are kept in 16 bits. `dtype` is that of the original weight, which the plan
    finds out where a format says it (`nf4`), `rank` that of a low-rank term beside the codes, which the pass `lorc` says. Of
    activations only: `dynamic` ranges are found anew at every call, and columns with a value of `threshold` or more are not
    quantized (0: all are).

    Raises `UsageError` where the values contradict each other.
    """

    bits: int = 4
    symmetric: bool = True
    strategy: Strategy = "group"
    group_size: int | None = 128
    formula: Formula = "gptq"
    observer: Observer = "minmax"
    scale_dtype: ScaleDtype = "float16"
    dynamic: bool = False
    outliers: float = 0.0
    percentile: float = 99.9
    dtype: FloatDtype | None = None
    threshold: float = 0.0
    rank: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits {self.bits} is outside 2..8", "use --bits 2 to --bits 8")
        if self.strategy == "group" and (self.group_size is None or self.group_size < 1):
            raise UsageError(f"group size {self.group_size} is not a positive number of columns", GROUP_HINT)
        if self.strategy not in ("group", "flat") and self.group_size is not None:
            raise UsageError(f"strategy {self.strategy!r} has no groups, but group_size is {self.group_size}")
        if self.symmetric not in GRIDS[self.formula]:
            kind = "symmetric" if self.symmetric else "asymmetric"
            others = ", ".join(name for name, forms in GRIDS.items() if self.symmetric in forms)
            raise UsageError(f"the {self.formula!r} grid has no {kind} form", f"use one of: {others}")
        self._check_nf4()
        self._check_blocks()
        if self.scale_dtype == "bilevel" and (self.formula != "spqr" or self.strategy != "group"):
            raise UsageError("two-level scales need the 'spqr' grid and groups", "use --method spqr --group-size 32")
        if self.outliers and self.scale_dtype != "bilevel" and (self.strategy, self.formula) != ("channel", "signed"):
            raise UsageError(
                "outliers are kept beside two-level scales, or as columns beside signed codes with a scale per row",
                "use --method spqr or llm-int8",
            )
        if self.rank < 0:
            raise UsageError(f"rank {self.rank} is negative", "use for example 8, or 0 for no low-rank term")
        if self.threshold < 0:
            raise UsageError(f"threshold {self.threshold} is negative", "use 6, or 0 for none")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile {self.percentile} is outside 50..100", "use for example 99.9")
        if not 0 <= self.outliers < 1:
            raise UsageError(f"outliers {self.outliers} is no share of the weights", "use for example 0.01")

    def _check_nf4(self) -> None:
        if self.formula != "nf4":
            if self.strategy == "flat" or self.scale_dtype == "nested":
                raise UsageError("only NF4 has blocks of the flattened matrix and nested scales", "use --method nf4")
            return
        if self.bits != 4:
            raise UsageError(f"NF4 has 16 values, which is 4 bits, not {self.bits}", "use --bits 4")
        if self.strategy != "flat" or self.group_size not in FLAT_SIZES:
            sizes = ", ".join(map(str, FLAT_SIZES))
            raise UsageError(f"NF4 has no blocks of {self.group_size}", f"use strategy flat, --group-size {sizes}")
        if self.scale_dtype not in ("nested", "float32") or self.observer != "minmax":
            raise UsageError("NF4 divides by the largest magnitude, float32 or nested", "use --set scale_dtype=nested")

    def _check_blocks(self) -> None:
        if self.formula != "ggml":
            if self.scale_dtype == "super":
                raise UsageError("scales of super-blocks need the 'ggml' grid", "use --set formula=ggml")
            return
        if self.block is None:
            words = "with scale_dtype=super 4 bits asymmetric in groups of 32 (Q4_K), 6 bits symmetric in groups of 16 (Q6_K)"
            raise UsageError(f"GGUF has no block of {self.bits} bits in groups of {self.group_size} like this", words)

    @property
    def block(self) -> str | None:
        """The GGUF block of the 'ggml' grid, by its name there; None where there is none."""
        blocks = (
            {"super": K_QUANTS, "float16": PLAIN_BLOCKS}.get(self.scale_dtype, {}) if self.formula == "ggml" else {}
        )
        own = (self.bits, self.symmetric, self.group_size)
        return next((name for name, grid in blocks.items() if grid == own and self.strategy == "group"), None)

    @property
    def kind(self) -> Kind:
        """What a weight quantized so is made of: a grid, SpQR's two levels, NF4's blocks, GGUF's blocks, a grid and 16-bit
        columns, or any of these and a low-rank term."""
        if self.rank:
            return "low-rank"
        if self.formula in ("nf4", "ggml"):
            return "nf4" if self.formula == "nf4" else "blocks"
        if self.scale_dtype == "bilevel":
            return "two-level"
        return "columns" if self.outliers else "grid"

    @property
    def decomposes(self) -> bool:
        """Whether inputs quantized so can leave columns out: 8 bits, symmetric, a dynamic scale per token."""
        return (self.bits, self.symmetric, self.strategy, self.dynamic) == (8, True, "token", True)

    @property
    def maxq(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def torch_scale_dtype(self) -> "torch.dtype":
        """The dtype in which scales are stored, those of the second level where there are two."""
        import torch  # here, because the command line builds its flags from the recipes and starts without torch

        quantized = {"bilevel": torch.float16, "nested": torch.float32, "super": torch.float16}
        return quantized.get(self.scale_dtype) or getattr(torch, self.scale_dtype)

    def columns_per_scale(self, width: int) -> int:
        """How many of `width` input columns share one scale."""
        return self.group_size if self.strategy == "group" and self.group_size else width

    def for_width(self, width: int) -> "QuantArgs":
        """These arguments for a layer of `width` input columns: groups that do not divide it give way to the divisor
        nearest in ratio (ties to the smaller group; the whole row is a divisor too), super-blocks to plain blocks."""
        if self.formula == "ggml":
            return self._for_blocks(width)
        if self.strategy != "group" or self.group_size is None or width % self.group_size == 0:
            return self
        if (
            self.scale_dtype == "bilevel"
        ):  # tiles may be padded: groups of nearly the size asked for, the last one shorter
            return replace(self, group_size=math.ceil(width / max(1, round(width / self.group_size))))
        size = nearest_divisor(width, self.group_size)
        if size == width:
            return replace(self, strategy="channel", group_size=None)
        return replace(self, group_size=size)

    def _for_blocks(self, width: int) -> "QuantArgs":
        """Raises `UsageError` where rows of `width` columns have no block at all."""
        if width % PLAIN_BLOCK:
            raise UsageError(f"no GGUF block holds rows of {width} columns", "keep such layers dense with --keep")
        if self.scale_dtype != "super" or width % SUPER_BLOCK == 0:
            return self
        bits, symmetric, size = PLAIN_BLOCKS[IN_PLACE_OF[self.block or ""]]
        return replace(self, bits=bits, symmetric=symmetric, group_size=size, scale_dtype="float16")


def float_name(dtype: "torch.dtype") -> FloatDtype:
    """`torch.float16` as `float16`; whatever is none of the three that models are stored in counts as float32."""
    names: dict[str, FloatDtype] = {"torch.float16": "float16", "torch.bfloat16": "bfloat16"}
    return names.get(str(dtype), "float32")


GROUP_HINT = "use a multiple of 8 such as 32, 64 or 128, or -1 for one scale per output row"


def nearest_divisor(width: int, size: int) -> int:
    """The divisor of `width` whose ratio to `size` is nearest to one; ties to the smaller."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: (max(d / size, size / d), d))


def group_strategy(group_size: int) -> tuple[Strategy, int | None]:
    """Turn the user's `--group-size` into (strategy, group_size). -1 means one scale per output row.

    Raises `UsageError` for 0, negative sizes and sizes that are no multiple of 8 (no runtime packs them).
    """
    if group_size == -1:
        return "channel", None
    if group_size < 1 or group_size % 8:
        raise UsageError(f"group size {group_size} is not usable", GROUP_HINT)
    return "group", group_size

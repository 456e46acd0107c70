"""How one tensor is quantized, as a value.

Field names follow compressed-tensors if it has one. What kinds of weights other than the integer grid allow is in their records
(see `kinds.py`).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ...errors import UsageError
from . import kinds
from .prune_args import FloatDtype

if TYPE_CHECKING:
    import torch

Strategy = Literal["tensor", "channel", "group", "flat", "token"]
STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group", "token")  # of grids; a codebook's blocks are `flat`
Observer = Literal["minmax", "mse", "percentile", "average"]
REAL_ZEROS = ("spqr", "ggml")  # formulas whose zeros are not integers

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
    """One tensor's grid: `dequantized = scale * (code - zero)`, `code` in `0 .. 2**bits - 1`; other kinds say what theirs is.

    `strategy` says which values share a scale: the whole tensor, an output row (`channel`), `group_size` neighbouring
    input columns of a row (`group`), as many of the flattened matrix (`flat`), or a row of activations (`token`). `formula`
    names the published definition of scale and zero (see `grid.py`), or another kind of weight (see `kinds.py`); `observer`
    says how the range is found (`percentile`: the value that this many percent of the values stay below; see
    `calibrate/observers.py`), `scale_dtype` how the scale is stored: as a float, or quantized itself. `outliers` is the share
    of weights that keep a 16-bit residual (kind `bilevel`), or of input columns that are kept in 16 bits (`outlier_columns`).
    `dtype` is that of the original weight, which the plan finds if the kind records it; `rank` is that of a low-rank term
    added to the codes, which the pass `lorc` sets. Of activations only: `dynamic` ranges are found at every call, and columns
    with a value of `threshold` or more are not quantized (0: all are).

    Raises `UsageError` if the values contradict each other.
    """

    bits: int = 4
    symmetric: bool = True
    strategy: Strategy = "group"
    group_size: int | None = 128
    formula: str = "gptq"
    observer: Observer = "minmax"
    scale_dtype: str = "float16"
    dynamic: bool = False
    outliers: float = 0.0
    percentile: float = 99.9
    dtype: FloatDtype | None = None
    threshold: float = 0.0
    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UsageError(f"rank must be 0 or more, got {self.rank}", "use for example 8, or 0 for no low-rank term")
        if self.rank:  # the codes alone must be possible
            replace(self, rank=0)
            return
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits {self.bits} is outside 2..8", "use --bits 2 to --bits 8")
        if self.strategy == "group" and (self.group_size is None or self.group_size < 1):
            raise UsageError(f"group size {self.group_size} is not a positive number of columns", GROUP_HINT)
        if self.strategy not in ("group", "flat") and self.group_size is not None:
            raise UsageError(f"strategy {self.strategy!r} has no groups, but group_size is {self.group_size}")
        if self.threshold < 0:
            raise UsageError(f"threshold must be 0 or more, got {self.threshold}", "use 6, or 0 for none")
        if not 50 < self.percentile <= 100:
            raise UsageError(
                f"percentile must be above 50 and at most 100, got {self.percentile}", "use for example 99.9"
            )
        if not 0 <= self.outliers < 1:
            raise UsageError(f"outliers must be a share from 0 to below 1, got {self.outliers}", "use for example 0.01")
        kinds.check(self)

    @property
    def block(self) -> str | None:
        """The name of the GGUF block that has this 'ggml' grid; None if there is none."""
        blocks = (
            {"super": K_QUANTS, "float16": PLAIN_BLOCKS}.get(self.scale_dtype, {}) if self.formula == "ggml" else {}
        )
        own = (self.bits, self.symmetric, self.group_size)
        return next((name for name, grid in blocks.items() if grid == own and self.strategy == "group"), None)

    @property
    def kind(self) -> str:
        """The name of the kind of weight that is quantized by these arguments (see `kinds.py`)."""
        return kinds.name_of(self)

    @property
    def figures(self) -> dict[str, int | str]:
        """What a report says of the arguments of each layer."""
        return {"bits": self.bits, "group_size": self.group_size or -1}

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
        """The dtype in which scales are stored, those of the second level if there are two."""
        import torch  # here, because the command line builds its flags from the recipes and starts without torch

        return getattr(torch, kinds.scales()[self.scale_dtype])

    def columns_per_scale(self, width: int) -> int:
        """How many of `width` input columns share one scale."""
        return self.group_size if self.strategy == "group" and self.group_size else width

    def for_width(self, width: int) -> "QuantArgs":
        """These arguments for a layer of `width` input columns: groups that do not divide it become the divisor nearest in
        ratio (ties to the smaller; the whole row is a divisor too), unless the kind has its own rule.

        Raises `UsageError` if the kind cannot hold rows of this width.
        """
        own = kinds.kind_of(self).for_width
        if own is not None:
            return own(self, width)
        if self.strategy != "group" or self.group_size is None or width % self.group_size == 0:
            return self
        size = nearest_divisor(width, self.group_size)
        if size == width:
            return replace(self, strategy="channel", group_size=None)
        return replace(self, group_size=size)


def float_name(dtype: "torch.dtype") -> FloatDtype:
    """`torch.float16` as `float16`; a dtype that is none of the three that models are stored in counts as float32."""
    names: dict[str, FloatDtype] = {"torch.float16": "float16", "torch.bfloat16": "bfloat16"}
    return names.get(str(dtype), "float32")


GROUP_HINT = "use a multiple of 8 such as 32, 64 or 128, or -1 for one scale per output row"


def nearest_divisor(width: int, size: int) -> int:
    """The divisor of `width` whose ratio to `size` is nearest to one; ties to the smaller."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: (max(d / size, size / d), d))


def group_strategy(group_size: int) -> tuple[Strategy, int | None]:
    """Turn the user's `--group-size` into (strategy, group_size). -1 means one scale per output row.

    Raises `UsageError` for 0, negative sizes and sizes that are not a multiple of 8 (no runtime packs them).
    """
    if group_size == -1:
        return "channel", None
    if group_size < 1 or group_size % 8:
        raise UsageError(f"group size {group_size} is not usable", GROUP_HINT)
    return "group", group_size

"""How a tensor is quantized, as a value: `QuantArgs` for one tensor, `Scheme` for a layer.

Field names follow compressed-tensors where it has one. All validation of bits, groups and grids lives here.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from .errors import UsageError

Strategy = Literal["tensor", "channel", "group", "token"]
Formula = Literal["gptq", "signed", "ds", "awq", "spqr"]
Observer = Literal["minmax", "mse"]
ScaleDtype = Literal["float16", "bfloat16", "float32", "bilevel"]

# The named grids of the literature: which formulas exist in a symmetric and which in an asymmetric form.
GRIDS: dict[Formula, tuple[bool, ...]] = {
    "gptq": (True, False),
    "signed": (True,),
    "ds": (True, False),
    "awq": (False,),
    "spqr": (False,),
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QuantArgs:
    """One tensor's integer grid: `dequantized = scale * (code - zero)`, `code` in `0 .. 2**bits - 1`.

    `strategy` says which values share a scale: the whole tensor, an output row (`channel`), `group_size` neighbouring
    input columns of a row (`group`), or a row of activations (`token`). `formula` picks the published definition of
    scale and zero (see `grid.py`), `observer` how the range is found, `scale_dtype` how the scale is stored: as a float, or
    quantized itself (`bilevel`, see `tensor.py`). `outliers` is the share of weights that keep a 16-bit residual.

    Raises `UsageError` where the values contradict each other.
    """

    bits: int = 4
    symmetric: bool = True
    strategy: Strategy = "group"
    group_size: int | None = 128
    formula: Formula = "gptq"
    observer: Observer = "minmax"
    scale_dtype: ScaleDtype = "float16"
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits {self.bits} is outside 2..8", "use --bits 2 to --bits 8")
        if self.strategy == "group" and (self.group_size is None or self.group_size < 1):
            raise UsageError(f"group size {self.group_size} is not a positive number of columns", GROUP_HINT)
        if self.strategy != "group" and self.group_size is not None:
            raise UsageError(f"strategy {self.strategy!r} has no groups, but group_size is {self.group_size}")
        if self.symmetric not in GRIDS[self.formula]:
            kind = "symmetric" if self.symmetric else "asymmetric"
            others = ", ".join(name for name, forms in GRIDS.items() if self.symmetric in forms)
            raise UsageError(f"the {self.formula!r} grid has no {kind} form", f"use one of: {others}")

        if self.scale_dtype == "bilevel" and (self.formula != "spqr" or self.strategy != "group"):
            raise UsageError("two-level scales need the 'spqr' grid and groups", "use --method spqr --group-size 32")
        if self.outliers and self.scale_dtype != "bilevel":
            raise UsageError("only weights with two-level scales are stored with outliers", "use --method spqr")
        if not 0 <= self.outliers < 1:
            raise UsageError(f"outliers {self.outliers} is no share of the weights", "use for example 0.01")

    @property
    def maxq(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The dtype in which scales are stored, those of the second level where there are two."""
        return torch.float16 if self.scale_dtype == "bilevel" else getattr(torch, self.scale_dtype)

    def columns_per_scale(self, width: int) -> int:
        """How many of `width` input columns share one scale."""
        return self.group_size if self.strategy == "group" and self.group_size else width

    def for_width(self, width: int) -> "QuantArgs":
        """These arguments for a layer of `width` input columns: groups that do not divide it give way to the divisor
        nearest in ratio (ties to the smaller group; the whole row is a divisor too)."""
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


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Scheme:
    """How a linear layer is quantized: its weights, and (later cells of the taxonomy) its inputs."""

    weights: QuantArgs = QuantArgs()

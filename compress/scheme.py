"""How a tensor is quantized, as a value: `QuantArgs` for one tensor, `Scheme` for a layer.

Field names follow compressed-tensors where it has one. All validation of bits, groups and grids lives here.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from .errors import UsageError

Strategy = Literal["tensor", "channel", "group", "token"]
Formula = Literal["gptq", "signed", "ds", "awq", "spqr"]
Observer = Literal["minmax", "mse"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]

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
    scale and zero (see `grid.py`), `observer` how the range is found, `scale_dtype` how the scale is stored. `dynamic` ranges
    are found anew at every call: activations only.

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

    @property
    def maxq(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The dtype in which scales are stored."""
        return getattr(torch, self.scale_dtype)

    def columns_per_scale(self, width: int) -> int:
        """How many of `width` input columns share one scale."""
        return self.group_size if self.strategy == "group" and self.group_size else width

    def for_width(self, width: int) -> "QuantArgs":
        """These arguments for a layer of `width` input columns: groups that do not divide it give way to the divisor
        nearest in ratio (ties to the smaller group; the whole row is a divisor too)."""
        if self.strategy != "group" or self.group_size is None or width % self.group_size == 0:
            return self
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
    """How a linear layer is quantized: its weights, and its input activations (None: they stay as they are).

    Raises `UsageError` for cells of the taxonomy that make no sense.
    """

    weights: QuantArgs = QuantArgs()
    inputs: QuantArgs | None = None

    def __post_init__(self) -> None:
        if self.weights.dynamic or self.weights.strategy == "token":
            raise UsageError("weights do not change from call to call", "give them static scales")
        if self.inputs is None:
            return
        if self.inputs.strategy not in ("token", "tensor"):
            raise UsageError(f"inputs cannot have scales per {self.inputs.strategy}", "use strategy token or tensor")
        if self.inputs.strategy == "token" and not self.inputs.dynamic:
            raise UsageError("tokens are not known in advance", "use dynamic: true, or strategy tensor")
        if self.inputs.formula != "signed":
            raise UsageError(f"inputs have no {self.inputs.formula!r} grid", "use formula signed: symmetric")


def inputs_per(strategy: Strategy, dynamic: bool, bits: int = 8) -> QuantArgs:
    """The usual arguments of quantized inputs: symmetric integers, a scale per token or per tensor."""
    return QuantArgs(bits=bits, strategy=strategy, group_size=None, formula="signed", dynamic=dynamic)


def signed_weights(strategy: Strategy, bits: int = 8) -> QuantArgs:
    """Weights that meet quantized inputs: the signed grid, a scale per row (`channel`) or for the matrix (`tensor`)."""
    return QuantArgs(bits=bits, strategy=strategy, group_size=None, formula="signed")


# The levels of SmoothQuant: from the most careful to the fastest.
LEVELS: dict[str, Scheme] = {
    "O1": Scheme(signed_weights("tensor"), inputs_per("token", dynamic=True)),
    "O2": Scheme(signed_weights("tensor"), inputs_per("tensor", dynamic=True)),
    "O3": Scheme(signed_weights("tensor"), inputs_per("tensor", dynamic=False)),
}

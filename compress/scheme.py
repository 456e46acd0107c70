"""How a tensor is quantized or pruned, as a value: `QuantArgs`, `PruneArgs` for one tensor, `Scheme`, `Pruning` for a layer.

Field names follow compressed-tensors where it has one. All validation of bits, groups, grids and patterns lives here.
"""

import math
import re
from dataclasses import replace
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from .errors import UsageError

Strategy = Literal["tensor", "channel", "group", "flat", "token"]
Formula = Literal["gptq", "signed", "ds", "awq", "spqr", "nf4"]
Observer = Literal["minmax", "mse"]
FloatDtype = Literal["float16", "bfloat16", "float32"]
ScaleDtype = Literal["float16", "bfloat16", "float32", "bilevel", "nested"]
Kind = Literal["grid", "two-level", "nf4", "columns", "low-rank"]

# The named grids of the literature: which formulas exist in a symmetric and which in an asymmetric form.
GRIDS: dict[Formula, tuple[bool, ...]] = {
    "gptq": (True, False),
    "signed": (True,),
    "ds": (True, False),
    "awq": (False,),
    "spqr": (False,),
    "nf4": (True,),
}
FLAT_SIZES = tuple(2**n for n in range(5, 13))  # blocks that bitsandbytes knows


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QuantArgs:
    """One tensor's grid: `dequantized = scale * (code - zero)`, `code` in `0 .. 2**bits - 1`; `scale * NF4[code]` for `nf4`.

    `strategy` says which values share a scale: the whole tensor, an output row (`channel`), `group_size` neighbouring
    input columns of a row (`group`), as many of the flattened matrix (`flat`), or a row of activations (`token`). `formula`
    picks the published definition of scale and zero (see `grid.py`), `observer` how the range is found, `scale_dtype` how
    the scale is stored: as a float, or quantized itself (`bilevel`, `nested`, see `tensor.py`). `outliers` is the share of
    weights that keep a 16-bit residual (`bilevel`), or of input columns that are kept in 16 bits. `dtype` is that of the
    original weight, which the plan finds out where a format says it (`nf4`), `rank` that of a low-rank term beside the codes,
    which the pass `lorc` says. Of activations only: `dynamic` ranges are found
    anew at every call, and columns with a value of `threshold` or more are not quantized (0: all are).

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

    @property
    def kind(self) -> Kind:
        """What a weight quantized so is made of: a grid, SpQR's two levels, NF4's blocks, a grid and 16-bit
        columns, or any of these and a low-rank term."""
        if self.rank:
            return "low-rank"
        if self.formula == "nf4":
            return "nf4"
        if self.scale_dtype == "bilevel":
            return "two-level"
        return "columns" if self.outliers else "grid"

    @property
    def maxq(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The dtype in which scales are stored, those of the second level where there are two."""
        quantized = {"bilevel": torch.float16, "nested": torch.float32}
        return quantized.get(self.scale_dtype) or getattr(torch, self.scale_dtype)

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


def float_name(dtype: torch.dtype) -> FloatDtype:
    """`torch.float16` as `float16`; whatever is none of the three that models are stored in counts as float32."""
    names: dict[torch.dtype, FloatDtype] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
    return names.get(dtype, "float32")


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
        decomposed = self.inputs is not None and (self.inputs.dynamic, self.inputs.strategy) == (True, "token")
        if self.weights.kind == "columns" and not (decomposed and self.weights.bits == 8):
            raise UsageError("16-bit columns are kept beside 8-bit weights for 8-bit tokens", "use --method llm-int8")
        if self.inputs is None:
            return
        if self.inputs.threshold and self.weights.kind != "columns":
            raise UsageError("a threshold of the inputs needs weights with 16-bit columns", "use --method llm-int8")
        if self.inputs.strategy not in ("token", "tensor"):
            raise UsageError(f"inputs cannot have scales per {self.inputs.strategy}", "use strategy token or tensor")
        if self.inputs.strategy == "token" and not self.inputs.dynamic:
            raise UsageError("tokens are not known in advance", "use dynamic: true, or strategy tensor")
        if self.inputs.formula != "signed":
            raise UsageError(f"inputs have no {self.inputs.formula!r} grid", "use formula signed: symmetric")


def inputs_per(strategy: Strategy, dynamic: bool, bits: int = 8, threshold: float = 0.0) -> QuantArgs:
    """The usual arguments of quantized inputs: symmetric integers, a scale per token or per tensor."""
    return QuantArgs(
        bits=bits, strategy=strategy, dynamic=dynamic, threshold=threshold, group_size=None, formula="signed"
    )


def signed_weights(
    strategy: Strategy, bits: int = 8, outliers: float = 0.0, scale_dtype: ScaleDtype = "float16"
) -> QuantArgs:
    """Weights that meet quantized inputs: the signed grid, a scale per row (`channel`) or for the matrix (`tensor`)."""
    return QuantArgs(
        bits=bits, strategy=strategy, group_size=None, formula="signed", scale_dtype=scale_dtype, outliers=outliers
    )


# The levels of SmoothQuant: from the most careful to the fastest.
LEVELS: dict[str, Scheme] = {
    "O1": Scheme(signed_weights("tensor"), inputs_per("token", dynamic=True)),
    "O2": Scheme(signed_weights("tensor"), inputs_per("tensor", dynamic=True)),
    "O3": Scheme(signed_weights("tensor"), inputs_per("tensor", dynamic=False)),
}


Scope = Literal["layer", "row", "block"]
SCOPE_BLOCK = 128  # columns per block of the scope `block`
Storage = Literal["dense", "bitmask", "2:4"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneArgs:
    """How many weights of a layer are pruned, and how what is left is stored.

    `sparsity` is the share that goes; `scope` says which weights compete for it: all of the layer, those of each output
    row, or those of 128 columns of all rows (None: as the method has it). A `pattern` `n:m` instead prunes `n` of every `m`
    neighbouring input columns. `storage` `dense` keeps the zeros, `bitmask` stores a bit per weight and the values that are
    left, `2:4` two of four values with their 2-bit places. `dtype` is that of the stored values (None: the model's own for
    `dense`, else 16 bits). `transposed`: dense weights lie as `[in, out]`, which the plan finds out.

    Raises `UsageError` where the values contradict each other.
    """

    sparsity: float = 0.5
    pattern: str | None = None
    scope: Scope | None = None
    storage: Storage = "dense"
    dtype: ScaleDtype | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"sparsity {self.sparsity} is outside 0..1", "use a share such as 0.5")
        if self.pattern is not None:
            zeros, group = _read_pattern(self.pattern)
            object.__setattr__(self, "sparsity", zeros / group)
        if self.storage == "2:4" and self.pattern != "2:4":
            raise UsageError("2:4 storage needs the pattern 2:4", "use --pattern 2:4, or --format bitmask")

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(zeros, group) of the pattern."""
        return None if self.pattern is None else _read_pattern(self.pattern)

    def zeros(self, rows: int, columns: int) -> int:
        """How many weights of a `rows` x `columns` layer are pruned: exact, whatever the weights are.

        `layer`: `ceil(rows * columns * sparsity)` (OBC). `row`: `int(columns * sparsity)` per row (Wanda). `block`: per 128
        columns `int(rows * 128 * sparsity) + 1` (SparseGPT, whose threshold itself is pruned).
        """
        if self.n_of_m is not None:
            zeros, group = self.n_of_m
            return rows * (columns // group * zeros + columns % group * zeros // group)
        if self.scope == "row":
            return rows * int(columns * self.sparsity)
        if self.scope == "block":
            widths = [min(SCOPE_BLOCK, columns - start) for start in range(0, columns, SCOPE_BLOCK)]
            return sum(block_zeros(rows * width, self.sparsity) for width in widths)
        return layer_zeros(rows * columns, self.sparsity)

    def for_layer(self, columns: int, stored: torch.dtype, scope: Scope, transposed: bool = False) -> "PruneArgs":
        """These arguments for a layer whose weight is stored as `stored`, pruned by a method whose own scope is `scope`."""
        half = stored if stored.itemsize == 2 else torch.float16
        dtype = self.dtype or str(stored if self.storage == "dense" else half).removeprefix("torch.")
        storage = "bitmask" if self.storage == "2:4" and columns % 4 else self.storage
        scope = self.scope or scope
        return replace(self, scope=scope, dtype=dtype, storage=storage, transposed=transposed)  # type: ignore[arg-type]


def layer_zeros(weights: int, sparsity: float) -> int:
    """`ceil(weights * sparsity)`, with no weight more for the rounding of the product."""
    return math.ceil(weights * sparsity - 1e-9 * weights)


def block_zeros(weights: int, sparsity: float) -> int:
    """SparseGPT's count: what is not above the entry at `int(weights * sparsity)` of the sorted scores."""
    return min(int(weights * sparsity) + 1, weights)


def _read_pattern(pattern: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    zeros, group = (int(n) for n in found.groups()) if found else (0, 0)
    if not 0 < zeros < group:
        raise UsageError(f"pattern {pattern!r} is not usable", "write zeros:group, for example 2:4 or 4:8")
    return zeros, group


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Pruning:
    """How a linear layer is pruned."""

    weights: PruneArgs = PruneArgs()


WeightArgs = QuantArgs | PruneArgs

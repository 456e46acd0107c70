"""How a tensor is pruned, as a value: all validation of sparsities, patterns and storage."""

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ...errors import UsageError

if TYPE_CHECKING:
    import torch

FloatDtype = Literal["float16", "bfloat16", "float32"]
Scope = Literal["layer", "row", "block"]
SCOPE_BLOCK = 128  # columns per block of the scope `block`
Storage = Literal["dense", "bitmask", "2:4"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneArgs:
    """How many weights of a layer are pruned, and how what is left is stored.

    `sparsity` is the share that goes; `scope` says which weights compete for it: all of the layer, those of each output
    row, or those of 128 columns of all rows (None: as the method has it). A `pattern` `n:m` instead prunes `n` of every `m`
    neighbouring input columns; `1xc` prunes that share in blocks of `c` of them (ExactOBS). `storage` `dense` keeps the
    zeros, `bitmask` stores a bit per weight and the values that are left, `2:4` two of four values with their 2-bit places.
    `dtype` is that of the stored values (None: the model's own for `dense`, else 16 bits). `transposed`: dense weights lie
    as `[in, out]`, which the plan finds out.

    Raises `UsageError` if the values contradict each other.
    """

    sparsity: float = 0.5
    pattern: str | None = None
    scope: Scope | None = None
    storage: Storage = "dense"
    dtype: FloatDtype | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"sparsity {self.sparsity} is outside 0..1", "use a share such as 0.5")
        if self.n_of_m is not None:
            zeros, group = self.n_of_m
            object.__setattr__(self, "sparsity", zeros / group)
        if self.storage == "2:4" and self.pattern != "2:4":
            raise UsageError("2:4 storage needs the pattern 2:4", "use --pattern 2:4, or --format bitmask")

    @property
    def kind(self) -> str:
        """The name of the kind of weight (see `kinds.py`)."""
        return "pruned"

    @property
    def figures(self) -> dict[str, int | str]:
        """What a report says of the arguments of each layer."""
        return {"storage": self.storage}

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(zeros, group) of a pattern `n:m`."""
        return None if self.pattern is None or self.block > 1 else _read_pattern(self.pattern)

    @property
    def block(self) -> int:
        """How many neighbouring columns are pruned together."""
        found = re.fullmatch(r"1x([1-9]\d*)", self.pattern or "")
        return int(found[1]) if found else 1

    def zeros(self, rows: int, columns: int) -> int:
        """How many weights of a `rows` x `columns` layer are pruned: exact, whatever the weights are.

        `layer`: `ceil(rows * columns * sparsity)` (OBC). `row`: `int(columns * sparsity)` per row (Wanda). `block`: per 128
        columns `int(rows * 128 * sparsity) + 1` (SparseGPT, whose threshold itself is pruned).
        """
        if self.n_of_m is not None:
            zeros, group = self.n_of_m
            return rows * (columns // group * zeros + columns % group * zeros // group)
        if self.scope == "row":
            return rows * int(columns // self.block * self.sparsity) * self.block
        if self.scope == "block":
            widths = [min(SCOPE_BLOCK, columns - start) for start in range(0, columns, SCOPE_BLOCK)]
            return sum(block_zeros(rows * width, self.sparsity) for width in widths)
        return layer_zeros(rows * columns // self.block, self.sparsity) * self.block

    def for_layer(self, columns: int, stored: "torch.dtype", scope: Scope, transposed: bool = False) -> "PruneArgs":
        """These arguments for a layer whose weight is stored as `stored`, pruned by a method whose own scope is `scope`."""
        name = str(stored).removeprefix("torch.")
        dtype = self.dtype or (name if self.storage == "dense" or stored.itemsize == 2 else "float16")
        storage = "bitmask" if self.storage == "2:4" and columns % 4 else self.storage
        scope, pattern = self.scope or scope, None if columns % self.block else self.pattern
        return replace(self, scope=scope, pattern=pattern, dtype=dtype, storage=storage, transposed=transposed)  # type: ignore[arg-type]


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
        raise UsageError(
            f"pattern {pattern!r} is not usable", "write zeros:group such as 2:4, or 1xcolumns such as 1x4"
        )
    return zeros, group


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Pruning:
    """How a linear layer is pruned."""

    weights: PruneArgs = PruneArgs()

"""How a tensor is quantized or pruned, as a value: `QuantArgs`, `PruneArgs` for one tensor, `Scheme`, `Pruning` for a layer.

Field names follow compressed-tensors where it has one. All validation of bits, groups, grids and patterns lives here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .errors import UsageError

Strategy = Literal["tensor", "channel", "group", "token"]
Formula = Literal["gptq", "signed", "ds", "awq", "spqr"]
STRATEGIES: tuple[Strategy, ...] = ("tensor", "channel", "group", "token")
Observer = Literal["minmax", "mse", "percentile", "average"]
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
    scale and zero (see `grid.py`), `observer` how the range is found (`percentile`: what so many hundredths of the values stay
    below; see `quantize/observers.py`), `scale_dtype` how the scale is stored: as a float, or
    quantized itself (`bilevel`, see `tensor.py`). `outliers` is the share of weights that keep a 16-bit residual. `dynamic`
    ranges are found anew at every call: activations only.

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
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile {self.percentile} is outside 50..100", "use for example 99.9")
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


CACHE_KEY = "lmpress_kv_cache"  # of config.json: other loaders pass over it and keep their cache in full precision
CACHE_STEP = 32  # tokens packed at a time where no group of them shares a scale


@plain_dataclass(frozen=True)
class Role:
    """What a quantized tensor is, and the cells of the taxonomy that it has: `ranges` by whether they are dynamic hold the
    strategies, those left out are in `reasons`; `observers` likewise by dynamic."""

    name: str
    ranges: Mapping[bool, tuple[Strategy, ...]]
    observers: Mapping[bool, tuple[Observer, ...]]
    formulas: tuple[Formula, ...]
    reasons: Mapping[tuple[str, bool], str]

    def reason(self, strategy: Strategy, dynamic: bool) -> str | None:
        """Why the role has no such scales, None where it has."""
        return None if strategy in self.ranges[dynamic] else self.reasons[strategy, dynamic]


EVERY_CALL = "weights do not change from call to call: give them static scales"
NO_SUM = "a product sums over the input channels, so they have one scale: use strategy token or tensor"
GROWING = "there are ever more tokens: use strategy token, or group, with dynamic: true"
WEIGHTS = Role(
    "weights",
    {False: ("tensor", "channel", "group"), True: ()},
    {False: ("minmax", "mse"), True: ()},
    ("gptq", "signed", "ds", "awq", "spqr"),
    {("token", False): "weights have no tokens: use strategy group, channel or tensor"}
    | {(strategy, True): EVERY_CALL for strategy in STRATEGIES},
)
INPUTS = Role(
    "inputs",
    {False: ("tensor",), True: ("tensor", "token")},
    {False: ("minmax", "mse", "percentile", "average"), True: ("minmax",)},
    ("signed", "gptq"),
    {("token", False): "tokens are not known in advance: use dynamic: true, or strategy tensor"}
    | {(strategy, dynamic): NO_SUM for strategy in ("channel", "group") for dynamic in (False, True)},
)
CACHED = Role(
    "cached keys and values",
    {False: (), True: ("token", "group")},
    {False: (), True: ("minmax", "mse")},
    ("spqr", "signed"),
    {
        (strategy, False): "what calibration did not see would be cut off for good: use dynamic: true"
        for strategy in STRATEGIES
    }
    | {(strategy, True): GROWING for strategy in ("tensor", "channel")},
)


def _refuse(role: Role, args: QuantArgs) -> None:
    """Raise `UsageError` where `args` are no cell of the taxonomy for this role."""
    reason = role.reason(args.strategy, args.dynamic)
    if reason is not None:
        kind = "dynamic" if args.dynamic else "static"
        raise UsageError(f"{role.name} have no {kind} scales per {args.strategy}: {reason}")
    if args.formula not in role.formulas:
        raise UsageError(f"{role.name} have no {args.formula!r} grid", f"use formula {' or '.join(role.formulas)}")
    if args.observer not in role.observers[args.dynamic]:
        kind = "dynamic" if args.dynamic else "static"
        usable = " or ".join(role.observers[args.dynamic])
        raise UsageError(f"{kind} {role.name} are not observed by {args.observer}", f"use observer {usable}")


def cache_args(bits: int, strategy: Strategy, group_size: int | None = None) -> QuantArgs:
    """The usual arguments of cached keys or values: a range that need not hold zero, found when tokens are packed."""
    return QuantArgs(bits, False, strategy, group_size, formula="spqr", dynamic=True)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CacheScheme:
    """How the keys and values of past tokens are kept (the layout of KIVI, Liu et al. 2024).

    The latest `window` tokens stay as they are. Older ones are packed `step` at a time: keys in groups of so many neighbouring
    tokens of a channel (strategy `group`) or with scales per token; values per token, or in groups of neighbouring channels of
    a token. A token's channels are those of all its key-value heads.

    Raises `UsageError` for cells of the taxonomy that make no sense.
    """

    keys: QuantArgs = cache_args(8, "group", 32)
    values: QuantArgs = cache_args(8, "group", 32)
    window: int = 64

    def __post_init__(self) -> None:
        for args in (self.keys, self.values):
            _refuse(CACHED, args)
        if self.step % 8:
            raise UsageError(f"groups of {self.step} tokens do not fill bytes", "use a multiple of 8")
        if self.window < 0:
            raise UsageError(f"a window of {self.window} tokens is not possible", "use 0 or a number such as 64")

    @classmethod
    def of(cls, bits: int, window: int = 64) -> "CacheScheme":
        """The usual scheme at `bits` bits."""
        return cls(cache_args(bits, "group", 32), cache_args(bits, "group", 32), window)

    @classmethod
    def found_in(cls, config: object) -> "CacheScheme | None":
        """The scheme that a model's config carries, if it does. Raises `UsageError` for one that cannot be read."""
        carried = getattr(config, CACHE_KEY, None)
        try:
            return None if carried is None else TypeAdapter(cls).validate_python(carried)
        except ValidationError as error:
            raise UsageError(f"{CACHE_KEY} of config.json is no cache scheme", "load with kv_bits=16") from error

    def __str__(self) -> str:
        same = self.keys.bits == self.values.bits
        bits = f"{self.keys.bits}" if same else f"{self.keys.bits}/{self.values.bits}"
        return f"kv={bits} bits, window {self.window}"

    @property
    def step(self) -> int:
        """How many tokens are packed at a time."""
        return self.keys.group_size or CACHE_STEP

    def packed(self, tokens: int) -> int:
        """How many of `tokens` cached tokens are packed."""
        return max(0, tokens - self.window) // self.step * self.step


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Scheme:
    """How a linear layer is quantized: its weights, and its input activations (None: they stay as they are).

    `kv` is how the model that it belongs to keeps the keys and values of past tokens (None: as they are).

    Raises `UsageError` for cells of the taxonomy that make no sense.
    """

    weights: QuantArgs = QuantArgs()
    inputs: QuantArgs | None = None
    kv: CacheScheme | None = None

    def __post_init__(self) -> None:
        _refuse(WEIGHTS, self.weights)
        if self.inputs is not None:
            _refuse(INPUTS, self.inputs)


def inputs_per(strategy: Strategy, dynamic: bool, bits: int = 8, symmetric: bool = True) -> QuantArgs:
    """The usual arguments of quantized inputs: integers with a scale per token or per tensor."""
    formula = "signed" if symmetric else "gptq"
    return QuantArgs(bits, symmetric, strategy, None, formula=formula, dynamic=dynamic)


def signed_weights(strategy: Strategy, bits: int = 8) -> QuantArgs:
    """Weights that meet quantized inputs: the signed grid, a scale per row (`channel`) or for the matrix (`tensor`)."""
    return QuantArgs(bits=bits, strategy=strategy, group_size=None, formula="signed")


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

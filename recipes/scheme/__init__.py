"""How a layer is quantized, as a value: `QuantArgs` for one tensor, `Scheme` for a layer (`prune_args.py` for pruning)."""

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ...errors import UsageError
from . import kinds
from .kv_cache import CACHE_KEY, CacheScheme, cache_args
from .prune_args import PruneArgs
from .quant_args import (
    REAL_ZEROS,
    STRATEGIES,
    SUPER_BLOCK,
    QuantArgs,
    Strategy,
    float_name,
    group_strategy,
    nearest_divisor,
)
from .taxonomy import CACHED, INPUTS, WEIGHTS, Role, refuse

__all__ = [
    "CACHED",
    "CACHE_KEY",
    "INPUTS",
    "LEVELS",
    "REAL_ZEROS",
    "STRATEGIES",
    "SUPER_BLOCK",
    "WEIGHTS",
    "CacheScheme",
    "PruneArgs",
    "QuantArgs",
    "Role",
    "Scheme",
    "Strategy",
    "WeightArgs",
    "cache_args",
    "float_name",
    "group_strategy",
    "inputs_per",
    "kinds",
    "nearest_divisor",
    "signed_weights",
]


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
        refuse(WEIGHTS, self.weights)
        if self.inputs is not None:
            refuse(INPUTS, self.inputs)
        kind = None if self.weights.kind == kinds.PLAIN else kinds.kind_of(self.weights)
        if kind is not None and kind.check_inputs is not None:
            kind.check_inputs(self.weights, self.inputs)
        elif self.inputs is not None and self.inputs.threshold:
            raise UsageError("a threshold of the inputs needs weights with 16-bit columns", "use --method llm-int8")


def inputs_per(
    strategy: Strategy, dynamic: bool, bits: int = 8, symmetric: bool = True, threshold: float = 0.0
) -> QuantArgs:
    """The usual arguments of quantized inputs: integers with a scale per token or per tensor."""
    formula = "signed" if symmetric else "gptq"
    return QuantArgs(bits, symmetric, strategy, None, formula=formula, dynamic=dynamic, threshold=threshold)


def signed_weights(strategy: Strategy, bits: int = 8, outliers: float = 0.0, scale_dtype: str = "float16") -> QuantArgs:
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


WeightArgs = QuantArgs | PruneArgs

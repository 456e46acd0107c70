"""How a model keeps the keys and values of past tokens."""

from dataclasses import replace

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ...errors import UsageError
from .quant_args import QuantArgs, Strategy
from .taxonomy import CACHED, refuse

CACHE_KEY = "lmpress_kv_cache"  # of config.json: other loaders pass over it and keep their cache in full precision
CACHE_STEP = 32  # tokens packed at a time if no group of them shares a scale


def cache_args(bits: int, strategy: Strategy, group_size: int | None = None) -> QuantArgs:
    """The usual arguments of cached keys or values: a range that need not hold zero, found when tokens are packed."""
    return QuantArgs(bits, False, strategy, group_size, formula="spqr", dynamic=True)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CacheScheme:
    """How the keys and values of past tokens are kept (the layout of KIVI, Liu et al. 2024).

    The latest `window` tokens stay as they are. Older ones are packed `step` at a time: keys in groups of so many neighbouring
    tokens of a channel (strategy `group`), with scales per token, or with one scale a channel that was calibrated (`channel`,
    static); values per token, or in groups of neighbouring channels of a token. Either may have one calibrated scale for all
    (`tensor`, static), as other runtimes keep them. A token's channels are those of all its key-value heads.

    Raises `UsageError` for cells of the taxonomy that make no sense.
    """

    keys: QuantArgs = cache_args(8, "group", 32)
    values: QuantArgs = cache_args(8, "group", 32)
    window: int = 64

    def __post_init__(self) -> None:
        for args in (self.keys, self.values):
            refuse(CACHED, args)
        if self.values.strategy == "channel":
            raise UsageError(
                "per-channel scales are not supported for cached values", "use strategy tensor, token or group"
            )
        if self.step % 8:
            raise UsageError(f"groups of {self.step} tokens do not fill bytes", "use a multiple of 8")
        if self.window < 0:
            raise UsageError(f"a window of {self.window} tokens is not possible", "use 0 or a number such as 64")

    @classmethod
    def of(cls, bits: int, window: int = 64) -> "CacheScheme":
        """The usual scheme at `bits` bits."""
        return cls(cache_args(bits, "group", 32), cache_args(bits, "group", 32), window)

    @classmethod
    def shared(cls, bits: int = 8, window: int = 0, scale_dtype: str = "float16") -> "CacheScheme":
        """Symmetric, with one calibrated scale for all keys of a layer and one for its values."""
        args = QuantArgs(bits, True, "tensor", None, formula="signed", scale_dtype=scale_dtype)
        return cls(args, args, window)

    @classmethod
    def found_in(cls, config: object) -> "CacheScheme | None":
        """The scheme that a model's config carries, if it does. Raises `UsageError` for one that cannot be read."""
        carried = getattr(config, CACHE_KEY, None)
        try:
            return None if carried is None else TypeAdapter(cls).validate_python(carried)
        except ValidationError as error:
            raise UsageError(f"{CACHE_KEY} of config.json is not a cache scheme", "load with kv_bits=16") from error

    def at(self, bits: int) -> "CacheScheme":
        """This scheme at `bits` bits."""
        return replace(self, keys=replace(self.keys, bits=bits), values=replace(self.values, bits=bits))

    def __str__(self) -> str:
        same = self.keys.bits == self.values.bits
        bits = f"{self.keys.bits}" if same else f"{self.keys.bits}/{self.values.bits}"
        static = " and ".join(name for name in ("keys", "values") if not getattr(self, name).dynamic)
        return f"kv={bits} bits, window {self.window}{f', static {static}' if static else ''}"

    @property
    def static(self) -> bool:
        """Whether any scales are calibrated."""
        return not (self.keys.dynamic and self.values.dynamic)

    @property
    def is_shared(self) -> bool:
        """Whether other runtimes can read it: symmetric, as many bits and one calibrated scale for keys and for values."""
        alike = self.keys.bits == self.values.bits
        return alike and all(args.strategy == "tensor" and args.symmetric for args in (self.keys, self.values))

    @property
    def step(self) -> int:
        """How many tokens are packed at a time."""
        return self.keys.group_size or CACHE_STEP

    def packed(self, tokens: int) -> int:
        """How many of `tokens` cached tokens are packed."""
        return max(0, tokens - self.window) // self.step * self.step

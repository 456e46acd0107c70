"""The taxonomy: what a quantized tensor can be, which scales and observers it has then, and why not others."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import UsageError
from . import kinds
from .quant_args import STRATEGIES, Observer, QuantArgs, Strategy


@dataclass(frozen=True)
class Role:
    """What a quantized tensor is, and the cells of the taxonomy that it has: `ranges` by whether they are dynamic hold the
    strategies, those left out are in `reasons`; `observers` likewise by dynamic; `only` are its formulas (empty: all)."""

    name: str
    ranges: Mapping[bool, tuple[Strategy, ...]]
    observers: Mapping[bool, tuple[Observer, ...]]
    only: tuple[str, ...]
    reasons: Mapping[tuple[str, bool], str]

    @property
    def formulas(self) -> tuple[str, ...]:
        """The formulas that the role has."""
        return self.only or tuple(kinds.formulas())

    def reason(self, strategy: Strategy, dynamic: bool) -> str | None:
        """Why the role has no such scales, None if it has."""
        reason = self.reasons.get((strategy, dynamic), "blocks of a flattened matrix are static scales of NF4 weights")
        return None if strategy in self.ranges[dynamic] else reason


EVERY_CALL = "weights do not change from call to call: give them static scales"
NO_SUM = "a product sums over the input channels, so they have one scale: use strategy token or tensor"
GROWING = "there are ever more tokens: use strategy token, or group, with dynamic: true"
UNKNOWN = "tokens to come are not known in advance: use strategy tensor or channel, or dynamic: true"
WEIGHTS = Role(
    "weights",
    {False: ("tensor", "channel", "group", "flat"), True: ()},
    {False: ("minmax", "mse"), True: ()},
    (),
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
    {False: ("tensor", "channel"), True: ("token", "group")},
    {False: ("minmax", "mse"), True: ("minmax", "mse")},
    ("spqr", "signed"),
    {(strategy, False): UNKNOWN for strategy in ("token", "group")}
    | {(strategy, True): GROWING for strategy in ("tensor", "channel")},
)


def refuse(role: Role, args: QuantArgs) -> None:
    """Raise `UsageError` if `args` are no cell of the taxonomy for this role."""
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

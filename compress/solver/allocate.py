"""Which layer gets how much: the smallest total error within a total cost, by dynamic programming over a database.

Any method fills the database: for every layer some levels (sparsities, bit widths, formats), each with its cost (bytes,
weights kept, time) and its error (the layer's loss, or what the model loses when that layer alone is compressed).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ...errors import UsageError

BUCKETS = 10_000  # the budget's resolution (OBC)

Level = TypeVar("Level")


@dataclass(frozen=True)
class Option:
    """One level of one layer: what it costs and what it does harm to."""

    cost: float
    error: float


def allocate(database: Mapping[str, Sequence[Option]], budget: float, buckets: int = BUCKETS) -> dict[str, int]:
    """The index of the chosen option of every layer: least sum of errors with a sum of costs of at most `budget`.

    What the budget leaves beyond the cheapest choice of every layer is cut into `buckets`, or into whole units where costs
    are few and whole; a level's extra cost is rounded up to them, so that cheap levels neither vanish nor come for free,
    and the budget is kept. Raises `UsageError` where it cannot be.
    """
    cheapest = {name: min(option.cost for option in options) for name, options in database.items()}
    spare = budget - sum(cheapest.values())
    if spare < -1e-9 * abs(budget):
        raise UsageError(
            f"the budget {budget:g} is below {sum(cheapest.values()):g}, the least that the layers can cost",
            "raise it, or offer smaller levels",
        )
    unit = _whole_unit(option.cost - cheapest[name] for name, options in database.items() for option in options)
    if unit and spare / unit <= buckets:
        buckets = int(spare / unit + 1e-9)
    else:
        unit = spare / buckets
    best = torch.zeros(buckets + 1, dtype=torch.float64)
    choices = []
    for name, options in database.items():
        steps = [_steps(option.cost - cheapest[name], unit, buckets) for option in options]
        table = torch.full((len(options), buckets + 1), math.inf, dtype=torch.float64)
        for row, (option, step) in enumerate(zip(options, steps, strict=True)):
            if step <= buckets:
                table[row, step:] = best[: buckets + 1 - step] + option.error
        best, choice = table.min(dim=0)
        choices.append((name, steps, choice))
    left, chosen = buckets, {}
    for name, steps, choice in reversed(choices):
        chosen[name] = int(choice[left])
        left -= steps[chosen[name]]
    return {name: chosen[name] for name in database}


def _whole_unit(costs: Iterable[float]) -> int:
    """The greatest common divisor of `costs`, 0 where they are not whole."""
    found = list(costs)
    return math.gcd(*(int(cost) for cost in found)) if all(float(cost).is_integer() for cost in found) else 0


def _steps(cost: float, unit: float, buckets: int) -> int:
    """`cost` in whole units, rounded up; more than there are where nothing may be spent."""
    if cost <= 0:
        return 0
    return buckets + 1 if unit <= 0 else math.ceil(cost / unit - 1e-9)


def measure(
    levels: Mapping[str, Sequence[Level]], cost: Callable[[str, Level], float], error: Callable[[str, Level], float]
) -> dict[str, list[Option]]:
    """The database of all `levels` of all layers."""
    return {name: [Option(cost(name, level), error(name, level)) for level in of] for name, of in levels.items()}


def sparsity_levels(highest: float, shrink: float = 0.9) -> list[float]:
    """Sparsities from 0 whose density shrinks by the factor `shrink` from one to the next, up to `highest` (OBC: 0.99)."""
    count = int(math.log(1 - highest) / math.log(shrink) + 1e-9) + 1
    return [1 - shrink**k for k in range(count)]

"""Allocation of a budget to layers: the smallest total error within a total cost, by dynamic programming over a database.

The database holds, for every layer, some levels (sparsities, bit widths, formats), each with its cost (bytes, weights kept,
time) and its error (the layer's loss, or what the model loses if that layer alone is compressed).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...errors import UsageError

BUCKETS = 10_000  # the budget's resolution (OBC)


@dataclass(frozen=True)
class Option:
    """One level of one layer: its cost and its error."""

    cost: float
    error: float


def allocate(database: Mapping[str, Sequence[Option]], budget: float, buckets: int = BUCKETS) -> dict[str, int]:
    """The index of the chosen option of every layer: least sum of errors with a sum of costs of at most `budget`.

    The budget beyond the cheapest choice of every layer is divided into `buckets`, or into whole units if costs are whole
    numbers and there are few units; a level's extra cost is rounded up to them, so that cheap levels are neither lost nor
    free and the budget is kept. Raises `UsageError` if the cheapest choice exceeds the budget.
    """
    cheapest = {name: min(option.cost for option in options) for name, options in database.items()}
    spare = budget - sum(cheapest.values())
    if spare < -1e-9 * abs(budget):
        raise UsageError(
            f"the budget {budget:g} is below {sum(cheapest.values()):g}, the cost of the cheapest levels",
            "raise the budget, or give smaller levels",
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
    """The greatest common divisor of `costs`, 0 if they are not whole numbers."""
    found = list(costs)
    return math.gcd(*(int(cost) for cost in found)) if all(float(cost).is_integer() for cost in found) else 0


def _steps(cost: float, unit: float, buckets: int) -> int:
    """`cost` in whole units, rounded up; more than `buckets` if nothing may be spent."""
    if cost <= 0:
        return 0
    return buckets + 1 if unit <= 0 else math.ceil(cost / unit - 1e-9)

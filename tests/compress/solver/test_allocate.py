"""The allocation against brute force, and layers so small that their levels are below the resolution."""

from itertools import product

import pytest
import torch

from lmpress.compress.solver.allocate import Option, allocate
from lmpress.errors import UsageError


def database(layers: int, levels: int, seed: int = 0) -> dict[str, list[Option]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(layers):
        size = 10 + 90 * float(torch.rand((), generator=generator))
        errors = torch.rand(levels, generator=generator).cumsum(0).tolist()
        found[f"layer{layer}"] = [Option(round(size * 0.8**k), errors[k]) for k in range(levels)]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(seed: int) -> None:
    found = database(5, 4, seed)
    full = sum(options[0].cost for options in found.values())
    for share in (0.55, 0.7, 0.9, 1.0):
        chosen = allocate(found, share * full)
        cost, error = (sum(getattr(found[n][i], f) for n, i in chosen.items()) for f in ("cost", "error"))
        best = min(
            sum(o.error for o in combination)
            for combination in product(*found.values())
            if sum(o.cost for o in combination) <= share * full
        )
        assert cost <= share * full
        assert error == pytest.approx(best, rel=1e-9)


def test_cheap_levels_do_not_vanish() -> None:
    """A layer so small that all its levels fit into one bucket still gets one of them, and the best if the budget allows."""
    found = {"large": [Option(1e6, 0.0), Option(5e5, 1.0)], "small": [Option(10, 0.0), Option(1, 5.0)]}
    assert allocate(found, 1.1e6) == {"large": 0, "small": 0}
    assert allocate(found, 500_001) == {"large": 1, "small": 1}
    assert allocate(found, 500_010) == {"large": 1, "small": 0}


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(UsageError, match="below 6"):
        allocate({"a": [Option(6, 0.0), Option(8, 1.0)]}, 5)

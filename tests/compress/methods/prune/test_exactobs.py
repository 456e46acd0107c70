"""ExactOBS: the optimum on its mask, the repair of the drift, and which scopes it has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmpress.calibrate.statistics.drift import Drift
from lmpress.compress.block import Block, Linear
from lmpress.compress.methods.prune import exactobs
from lmpress.compress.solver.damped_hessian import damp
from lmpress.errors import UsageError
from lmpress.recipes.methods import Needs
from lmpress.recipes.scheme import PruneArgs
from lmpress.recipes.scheme.prune_args import Pruning

Layer = Callable[[int, int, int], tuple[Tensor, Tensor]]


@pytest.mark.parametrize(
    "args", [PruneArgs(0.5), PruneArgs(0.9), PruneArgs(pattern="2:4")], ids=["half", "most", "2:4"]
)
def test_it_is_the_optimum_on_its_mask(args: PruneArgs, layer: Layer) -> None:
    """Identity I2 in float64, by a solve per row."""
    weight, x = (tensor.double() for tensor in layer(12, 64, 300))
    hessian = damp(2 * x.T @ x, 0.0)
    found, pruned = exactobs.prune(weight, hessian, args)
    for row in range(12):
        kept = ~pruned[row]
        best = torch.linalg.solve(hessian.matrix[kept][:, kept], hessian.matrix[kept] @ weight[row])
        assert torch.allclose(found[row, kept], best, rtol=1e-6, atol=1e-9)


def test_the_drift_is_repaired(layer: Layer, statistic: Callable[[Tensor], Any]) -> None:
    """Pruning with compressed inputs: the output comes back towards what the original inputs gave."""
    generator = torch.Generator().manual_seed(5)
    weight, original = layer(6, 24, 600)
    here = original + 0.3 * torch.randn(600, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    drift = Drift(6, 24, torch.float64)
    drift.update((original - here) @ weight.T, here, sequences=1)
    errors = []
    for share in (0.0, 1.0):
        args = PruneArgs(0.2).for_layer(24, torch.float32, "layer")
        linear = Linear("layer", weight, args, statistic(here), drift)
        exactobs.apply(exactobs.ExactOBS(damping=1e-6, drift=share), Block("block", nn.Identity(), [linear]))
        result: Any = linear.result
        errors.append(float((here @ result.values.T - original @ weight.T).norm()))
    target = torch.linalg.lstsq(here.double(), (original @ weight.T).double()).solution.T
    least = float((here.double() @ target.T - (original @ weight.T).double()).norm())
    assert errors[1] < 0.9 * errors[0]
    assert least <= errors[1]


def test_a_budget_of_column_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="scope"):
        exactobs.ExactOBS(scheme=Pruning(PruneArgs(scope="block")))


def test_the_drift_is_collected_only_if_it_is_repaired() -> None:
    assert exactobs.ExactOBS().needs == Needs(hessian=True, drift=True)
    assert exactobs.ExactOBS(drift=0.0).needs == Needs(hessian=True)

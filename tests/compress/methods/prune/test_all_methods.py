"""What holds for every pruning method: exact counts, hard layers, and the order of the methods by loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lmpress.calibrate.statistics.hessian import Hessian
from lmpress.compress.block import Linear
from lmpress.compress.methods.prune.masks import smallest
from lmpress.compress.solver.damped_hessian import damp
from lmpress.compress.solver.masked_lstsq import masked_lstsq, row_losses
from lmpress.recipes.methods import Family, method, method_names
from lmpress.recipes.scheme import PruneArgs

Layer = Callable[[int, int, int], tuple[Tensor, Tensor]]
Prune = Callable[..., Any]
NAMES = method_names(Family.PRUNE)
ARGS = {
    "half": PruneArgs(0.5),
    "most": PruneArgs(0.9),
    "2:4": PruneArgs(pattern="2:4"),
    "4:8": PruneArgs(pattern="4:8"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("args", ARGS.values(), ids=ARGS)
@pytest.mark.parametrize("shape", [(24, 64), (7, 37), (1, 20), (20, 1), (3, 150)], ids=str)
def test_exactly_as_many_zeros_as_planned(
    name: str, args: PruneArgs, shape: tuple[int, int], layer: Layer, prune: Prune
) -> None:
    rows, columns = shape
    linear: Linear = prune(name, *layer(rows, columns, 4 * columns), args)
    found: Any = linear.result
    assert int((~found.kept).sum()) == found.args.zeros(rows, columns)
    assert not found.values[~found.kept].any()
    assert linear.figures["sparsity"] == pytest.approx(found.args.zeros(rows, columns) / (rows * columns))
    if args.n_of_m is not None:
        zeros, group = args.n_of_m
        whole = columns // group * group
        assert ((~found.kept[:, :whole]).view(rows, -1, group).sum(2) == zeros).all()


@pytest.mark.parametrize("name", NAMES)
def test_difficult_layers(name: str, layer: Layer, prune: Prune) -> None:
    """Fewer tokens than columns, dead and repeated columns, a row of zeros."""
    weight, x = layer(9, 48, 20)
    x[:, [3, 30]] = 0
    x[:, 11] = x[:, 10]
    weight[4] = 0
    for args in (PruneArgs(0.5), PruneArgs(pattern="2:4")):
        found = prune(name, weight, x, args).result
        assert found.values.isfinite().all()
        assert int((~found.kept).sum()) == found.args.zeros(9, 48)


@pytest.mark.parametrize("args", [PruneArgs(0.5), PruneArgs(pattern="2:4"), PruneArgs(pattern="4:8")], ids=str)
def test_losses_are_in_order(args: PruneArgs, layer: Layer, prune: Prune) -> None:
    weight, x = layer(48, 96, 800)
    hessian = 2 * x.T.double() @ x.double()
    methods: list[tuple[str, dict[str, object]]] = [
        ("exactobs", {}),
        ("sparsegpt", {"refit": True}),
        ("sparsegpt", {}),
        ("wanda", {}),
        ("magnitude", {}),
    ]
    found = [prune(name, weight, x, args, **options).result.dequantize() for name, options in methods]
    losses = [float(row_losses((weight - q).double(), hessian).sum()) for q in found]
    assert losses == sorted(losses)


@pytest.mark.parametrize("name", [name for name in NAMES if "refit" in method(name).options()])
def test_refit_keeps_the_mask_and_lowers_the_loss(
    name: str, layer: Layer, prune: Prune, statistic: Callable[[Tensor], Hessian]
) -> None:
    weight, x = layer(16, 64, 300)
    plain, refitted = (prune(name, weight, x, PruneArgs(0.5, dtype="float32"), refit=on).result for on in (False, True))
    assert torch.equal(plain.kept, refitted.kept)
    hessian = damp(statistic(x).matrix(), 0.01).matrix
    before, after = (float(row_losses((weight - r.values).double(), hessian).sum()) for r in (plain, refitted))
    assert after < 0.9 * before
    optimum = masked_lstsq(weight.double(), hessian, ~plain.kept)
    assert torch.allclose(refitted.values.double(), optimum, atol=1e-5)


def test_ties_are_counted_exactly() -> None:
    scores = torch.ones(4, 8)
    for args in (PruneArgs(0.5), PruneArgs(0.5, scope="row"), PruneArgs(0.5, scope="block"), PruneArgs(pattern="2:4")):
        assert int(smallest(scores, args).sum()) == args.zeros(4, 8)

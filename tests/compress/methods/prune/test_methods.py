"""Every pruning method on one layer: exact counts, references written from the formulas, and their order by loss."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lmpress.calibrate.statistics.drift import Drift
from lmpress.calibrate.statistics.hessian import Hessian
from lmpress.compress.block import Block, Linear
from lmpress.compress.methods.prune import exactobs, magnitude, obd, obs, sparsegpt, wanda
from lmpress.compress.methods.prune.masks import smallest
from lmpress.compress.solver.damped_hessian import damp
from lmpress.compress.solver.masked_lstsq import masked_lstsq, row_losses
from lmpress.compress.solver.sweep import sweep
from lmpress.errors import UsageError
from lmpress.kernels.tensor import PrunedTensor
from lmpress.recipes.methods import method
from lmpress.recipes.scheme import PruneArgs, QuantArgs
from lmpress.recipes.scheme.prune_args import Pruning, block_zeros, layer_zeros

METHODS = ("magnitude", "wanda", "sparsegpt", "exactobs", "obd", "obs")


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    return (
        torch.randn(tokens, width, generator=generator) @ mixing * torch.rand(width, generator=generator).mul(2).exp()
    )


def weights(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def statistic(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[1], torch.float64)
    hessian.update(x, sequences=1)
    return hessian


def run(name: str, weight: Tensor, x: Tensor, args: PruneArgs, **options: object) -> Linear:
    """The layer after the method `name` with `options`; only `args` differs."""
    known = method(name)
    resolved = args.for_layer(weight.shape[1], torch.float32, known.config.scope)
    linear = Linear("layer", weight, resolved, statistic(x))
    known.apply(known.config(scheme=Pruning(args), **options), Block("block", nn.Identity(), [linear]))
    return linear


def result(linear: Linear) -> PrunedTensor:
    assert isinstance(linear.result, PrunedTensor)
    return linear.result


ARGS = {
    "half": PruneArgs(0.5),
    "most": PruneArgs(0.9),
    "2:4": PruneArgs(pattern="2:4"),
    "4:8": PruneArgs(pattern="4:8"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("args", ARGS.values(), ids=ARGS)
@pytest.mark.parametrize("shape", [(24, 64), (7, 37), (1, 20), (20, 1), (3, 150)], ids=str)
def test_exactly_as_many_zeros_as_planned(name: str, args: PruneArgs, shape: tuple[int, int]) -> None:
    rows, columns = shape
    linear = run(name, weights(rows, columns), inputs(4 * columns, columns), args)
    found = result(linear)
    assert int((~found.kept).sum()) == found.args.zeros(rows, columns)
    assert not found.values[~found.kept].any()
    assert linear.figures["sparsity"] == pytest.approx(found.args.zeros(rows, columns) / (rows * columns))
    if args.n_of_m is not None:
        zeros, group = args.n_of_m
        whole = columns // group * group
        assert ((~found.kept[:, :whole]).view(rows, -1, group).sum(2) == zeros).all()


@pytest.mark.parametrize("name", METHODS)
def test_difficult_layers(name: str) -> None:
    """Fewer tokens than columns, dead and repeated columns, a row of zeros."""
    x, weight = inputs(20, 48), weights(9, 48)
    x[:, [3, 30]] = 0
    x[:, 11] = x[:, 10]
    weight[4] = 0
    for args in (PruneArgs(0.5), PruneArgs(pattern="2:4")):
        found = result(run(name, weight, x, args))
        assert found.values.isfinite().all()
        assert int((~found.kept).sum()) == found.args.zeros(9, 48)


def test_magnitude_is_the_smallest_weights() -> None:
    weight = weights(10, 30)
    found = result(run("magnitude", weight, inputs(100, 30), PruneArgs(0.3)))
    threshold = weight.abs().flatten().sort().values[90]
    assert torch.equal(found.kept, weight.abs() >= threshold)
    assert torch.equal(found.values[found.kept], weight[found.kept])


def test_wanda_per_row_by_the_formula() -> None:
    weight, x = weights(10, 31), inputs(100, 31)
    found = result(run("wanda", weight, x, PruneArgs(0.5)))
    scores = weight.abs().double() * x.double().square().sum(0).sqrt()
    for row in range(10):
        gone = sorted(range(31), key=lambda j: float(scores[row, j]))[: int(31 * 0.5)]
        assert set((~found.kept[row]).nonzero().flatten().tolist()) == set(gone)
    assert torch.equal(found.values[found.kept], weight[found.kept])  # kept weights do not change


def test_wanda_with_equal_norms_is_magnitude_per_row() -> None:
    weight = weights(8, 16)
    found = result(run("wanda", weight, torch.eye(16), PruneArgs(0.5)))
    by_size = result(run("magnitude", weight, torch.eye(16), PruneArgs(0.5, scope="row")))
    assert torch.equal(found.kept, by_size.kept)


def test_obd_ranks_rows_as_wanda_does() -> None:
    weight, x = weights(8, 16), inputs(90, 16)
    found = result(run("obd", weight, x, PruneArgs(0.5, scope="row")))
    assert torch.equal(found.kept, result(run("wanda", weight, x, PruneArgs(0.5))).kept)
    hessian = damp(2 * x.T.double() @ x.double(), 0.0)
    total = layer_zeros(8 * 16, 0.5)
    scores = (weight.double() ** 2 * x.double().square().sum(0)).flatten()
    expected = set(scores.argsort()[:total].tolist())
    pruned = obd.prune(weight.double(), hessian, PruneArgs(0.5))[1]
    assert set(pruned.flatten().nonzero().flatten().tolist()) == expected


def textbook_sparsegpt(weight: Tensor, upper: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """SparseGPT as printed: masks from the updated weights, one column after another, full updates."""
    weight, width = weight.clone(), weight.shape[1]
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(width):
        if pattern is None and j % 128 == 0:
            scores = weight[:, j : j + 128] ** 2 / upper.diagonal()[j : j + 128] ** 2
            threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
            mask[:, j : j + 128] = scores <= threshold
        if pattern is not None and j % pattern[1] == 0:
            scores = weight[:, j : j + pattern[1]] ** 2 / upper.diagonal()[j : j + pattern[1]] ** 2
            mask[:, j : j + pattern[1]].scatter_(1, scores.argsort(1)[:, : pattern[0]], True)
        settled = weight[:, j].masked_fill(mask[:, j], 0)
        error = (weight[:, j] - settled) / upper[j, j]
        weight[:, j:] -= torch.outer(error, upper[j, j:])
        weight[:, j] = settled
    return weight


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
def test_sparsegpt_equals_the_textbook(pattern: str | None) -> None:
    x, weight = inputs(700, 296).double(), weights(20, 296).double()
    hessian, args = damp(2 * x.T @ x, 0.01), PruneArgs(0.5, pattern=pattern)
    found, pruned = sparsegpt.prune(weight, hessian, args)
    expected = textbook_sparsegpt(weight, hessian.upper, 0.5, args.n_of_m)
    assert torch.equal(pruned, expected == 0)
    assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_sparsegpt_bookkeeping(pattern: str | None, dtype: torch.dtype, tolerance: float) -> None:
    """Identity I1 in both precisions."""
    x, weight = inputs(500, 150).double(), weights(16, 150).to(dtype)
    hessian = damp(2 * x.T @ x, 0.01)
    upper, columns = hessian.upper.to(dtype), weight.T.contiguous()
    projection = sparsegpt.ZeroProjection(upper.diagonal(), PruneArgs(0.5, pattern=pattern), columns)
    errors = sweep(columns, upper, projection)
    delta = weight - columns.T
    assert (delta - errors.T @ upper).norm() <= tolerance * delta.norm()
    loss = float(row_losses(delta.double(), hessian.matrix).sum())
    assert float(errors.double().square().sum()) / 2 == pytest.approx(loss, rel=tolerance)


def test_sparsegpt_prunes_hardly_more_than_asked() -> None:
    assert block_zeros(128 * 10, 0.5) == 641
    weight = weights(10, 128)
    found = result(run("sparsegpt", weight, inputs(300, 128), PruneArgs(0.0)))
    assert int((~found.kept).sum()) == 1  # the threshold itself is pruned, as published


@pytest.mark.parametrize(
    "args", [PruneArgs(0.5), PruneArgs(0.9), PruneArgs(pattern="2:4")], ids=["half", "most", "2:4"]
)
def test_exactobs_is_the_optimum_on_its_mask(args: PruneArgs) -> None:
    """Identity I2 in float64, by a solve per row."""
    x, weight = inputs(300, 64).double(), weights(12, 64).double()
    hessian = damp(2 * x.T @ x, 0.0)
    found, pruned = exactobs.prune(weight, hessian, args)
    for row in range(12):
        kept = ~pruned[row]
        best = torch.linalg.solve(hessian.matrix[kept][:, kept], hessian.matrix[kept] @ weight[row])
        assert torch.allclose(found[row, kept], best, rtol=1e-6, atol=1e-9)


def test_obs_in_one_block_is_nearly_exactobs() -> None:
    x, weight = inputs(300, 40).double(), weights(6, 40).double()
    hessian = damp(2 * x.T @ x, 0.0)
    whole, small = (obs.prune(weight, hessian, PruneArgs(0.5), block)[0] for block in (40, 10))
    exact = exactobs.prune(weight, hessian, PruneArgs(0.5))[0]
    losses = [float(row_losses(weight - q, hessian.matrix).sum()) for q in (exact, whole, small)]
    assert losses[0] <= losses[1] * 1.02 and losses[1] <= losses[0] * 1.1
    assert losses[1] < losses[2]


@pytest.mark.parametrize("args", [PruneArgs(0.5), PruneArgs(pattern="2:4"), PruneArgs(pattern="4:8")], ids=str)
def test_losses_are_in_order(args: PruneArgs) -> None:
    weight, x = weights(48, 96), inputs(800, 96)
    hessian = 2 * x.T.double() @ x.double()
    methods = [("exactobs", {}), ("sparsegpt", {"refit": True}), ("sparsegpt", {}), ("wanda", {}), ("magnitude", {})]
    found = [result(run(name, weight, x, args, **options)).dequantize() for name, options in methods]
    losses = [float(row_losses((weight - q).double(), hessian).sum()) for q in found]
    assert losses == sorted(losses)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "obd"])
def test_refit_keeps_the_mask_and_lowers_the_loss(name: str) -> None:
    weight, x = weights(16, 64), inputs(300, 64)
    plain, refitted = (run(name, weight, x, PruneArgs(0.5, dtype="float32"), refit=on) for on in (False, True))
    assert torch.equal(result(plain).kept, result(refitted).kept)
    hessian = damp(statistic(x).matrix(), 0.01).matrix
    before, after = (float(row_losses((weight - result(r).values).double(), hessian).sum()) for r in (plain, refitted))
    assert after < 0.9 * before
    optimum = masked_lstsq(weight.double(), hessian, ~result(plain).kept)
    assert torch.allclose(result(refitted).values.double(), optimum, atol=1e-5)


def test_the_drift_is_compensated() -> None:
    """Pruning one weight only, with compressed inputs: the output equals that of the original inputs again."""
    generator = torch.Generator().manual_seed(5)
    original, weight = inputs(600, 24), weights(6, 24)
    here = original + 0.3 * torch.randn(600, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    drift = Drift(6, 24, torch.float64)
    drift.update((original - here) @ weight.T, here, sequences=1)
    errors = []
    for share in (0.0, 1.0):
        args = PruneArgs(0.2).for_layer(24, torch.float32, "layer")
        linear = Linear("layer", weight, args, statistic(here), drift)
        exactobs.apply(exactobs.ExactOBS(damping=1e-6, drift=share), Block("block", nn.Identity(), [linear]))
        errors.append(float((here @ result(linear).values.T - original @ weight.T).norm()))
    target = torch.linalg.lstsq(here.double(), (original @ weight.T).double()).solution.T
    least = float((here.double() @ target.T - (original @ weight.T).double()).norm())
    assert errors[1] < 0.9 * errors[0]
    assert least <= errors[1]


def test_unsupported_scopes_are_refused() -> None:
    with pytest.raises(UsageError, match="scope"):
        exactobs.ExactOBS(scheme=Pruning(PruneArgs(scope="block")))
    with pytest.raises(UsageError, match="supports only the scope block"):
        sparsegpt.SparseGPT(scheme=Pruning(PruneArgs(scope="row")))
    linear = Linear("layer", weights(4, 8), QuantArgs(), statistic(inputs(20, 8)))
    with pytest.raises(UsageError, match="to be quantized"):
        wanda.apply(wanda.Wanda(), Block("block", nn.Identity(), [linear]))


def test_ties_are_counted_exactly() -> None:
    scores = torch.ones(4, 8)
    for args in (PruneArgs(0.5), PruneArgs(0.5, scope="row"), PruneArgs(0.5, scope="block"), PruneArgs(pattern="2:4")):
        assert int(smallest(scores, args).sum()) == args.zeros(4, 8)
    assert magnitude.Magnitude().needs == frozenset()
    assert replace(magnitude.Magnitude(), refit=True).needs == {"hessian"}

"""The greedy elimination against a plain loop over the formulas, and the identities I2 and I5."""

import math

import pytest
import torch
from torch import Tensor

from lmpress.compress.solver.obs_elimination import EliminationTrace, GridProjection, eliminate
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.scheme import QuantArgs


def problem(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a correlated damped Hessian with outlier channels, its inverse: float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    spread = torch.rand(width, generator=generator, dtype=torch.float64).mul(2).exp()
    inputs = torch.randn(3 * width + 5, width, generator=generator, dtype=torch.float64) @ mixing * spread
    hessian = inputs.T @ inputs
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), hessian, torch.linalg.inv(hessian)


def obs_from_scratch(
    weight: Tensor, hessian: Tensor, steps: int, pattern: tuple[int, int] | None = None, block: int = 1
):
    """One row: the next block is the one whose removal, solved from scratch for every candidate, costs least."""
    kept = list(range(len(weight)))
    order, losses, total = [], [], 0.0
    for _ in range(steps):
        best = None
        for start in range(0, len(weight), block):
            gone = [j for j in range(start, min(start + block, len(weight))) if j in kept]
            group = [j for j in range(len(weight)) if pattern and j // pattern[1] == start // pattern[1]]
            if not gone or (pattern and sum(j not in kept for j in group) >= len(group) * pattern[0] // pattern[1]):
                continue
            rest = [j for j in kept if j not in gone]
            loss = optimum(weight, hessian, rest)[1]
            if best is None or loss < best[0]:
                best = (loss, start // block, rest)
        loss, chosen, kept = best
        order.append(chosen)
        losses.append(loss - total)
        total = loss
    return order, losses, optimum(weight, hessian, kept)[0]


def optimum(weight: Tensor, hessian: Tensor, kept: list[int]) -> tuple[Tensor, float]:
    """The least-squares weights with support `kept`, and their loss."""
    best = torch.zeros_like(weight)
    if kept:
        best[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight)
    return best, float((weight - best) @ hessian @ (weight - best)) / 2


def test_full_elimination_equals_obs_from_scratch() -> None:
    weight, hessian, inverse = problem(2, 21)
    trace = eliminate(weight, inverse)
    for row in range(2):
        order, losses, _ = obs_from_scratch(weight[row], hessian, 21)
        assert trace.order[row].tolist() == order
        assert torch.allclose(trace.losses[row], torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    assert not trace.settled.any()


@pytest.mark.parametrize(
    ("pattern", "width", "steps"), [((2, 4), 24, 12), ((4, 8), 24, 12), ((1, 4), 24, 6), ((2, 4), 15, 7)]
)
def test_patterns(pattern: tuple[int, int], width: int, steps: int) -> None:
    weight, hessian, inverse = problem(2, width)
    trace = eliminate(weight, inverse, pattern=pattern)
    assert trace.order.shape[1] == steps
    for row in range(2):
        order, losses, settled = obs_from_scratch(weight[row], hessian, steps, pattern)
        assert trace.order[row].tolist() == order
        assert torch.allclose(trace.settled[row], settled, atol=1e-9)
        assert sum(losses) == pytest.approx(float(trace.losses[row].sum()), rel=1e-9)
    whole = width // pattern[1] * pattern[1]
    zeros = (trace.settled[:, :whole] == 0).view(-1, pattern[1]).sum(1)
    assert (zeros == pattern[0]).all()


@pytest.mark.parametrize("block", [2, 3, 4])
def test_blocks(block: int) -> None:
    weight, hessian, inverse = problem(2, 22)
    trace = eliminate(weight, inverse, block=block)
    steps = -(-22 // block)
    for row in range(2):
        order, losses, _ = obs_from_scratch(weight[row], hessian, steps, block=block)
        assert trace.order[row].tolist() == order
        assert torch.allclose(trace.losses[row], torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_long_rows_cross_panels() -> None:
    """Identity I2 at every sparsity, over several panels: the losses are those of the optimum on the mask."""
    width = 150
    weight, hessian, inverse = problem(4, width)
    trace = eliminate(weight, inverse)
    for count in (1, width // 3, width // 2, 9 * width // 10, width):
        mask = trace.first(count)
        for row in range(4):
            loss = optimum(weight[row], hessian, (~mask[row]).nonzero().flatten().tolist())[1]
            assert float(trace.losses[row, :count].sum()) == pytest.approx(loss, rel=1e-8)


@pytest.mark.parametrize("options", [{}, {"pattern": (2, 4)}, {"block": 4}], ids=["all", "2:4", "1x4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_batches_do_not_matter(options: dict, dtype: torch.dtype) -> None:
    weight, _, inverse = problem(33, 60)
    results = [eliminate(weight.to(dtype), inverse.to(dtype), rows_at_once=n, **options) for n in (1, 7, 32, None)]
    for other in results[1:]:
        assert torch.equal(other.order, results[0].order)
        assert torch.allclose(other.losses, results[0].losses, rtol=1e-4 if dtype == torch.float32 else 1e-10)


def test_float32_finds_nearly_the_same_loss() -> None:
    weight, hessian, inverse = problem(16, 128)
    exact, single = eliminate(weight, inverse).mask(0.5), eliminate(weight.float(), inverse.float()).mask(0.5)
    losses = [
        sum(optimum(w, hessian, (~m).nonzero().flatten().tolist())[1] for w, m in zip(weight, mask, strict=True))
        for mask in (exact, single)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.777, 0.99])
@pytest.mark.parametrize("block", [1, 4])
def test_global_budget(sparsity: float, block: int) -> None:
    """Identity I5: zeros per row are counts of the smallest losses of all rows."""
    weight, _, inverse = problem(9, 40)
    trace = eliminate(weight * torch.arange(1, 10).unsqueeze(1), inverse, block=block)
    mask = trace.mask(sparsity)
    total = math.ceil(9 * (40 // block) * sparsity - 1e-6)
    entries = sorted((float(loss), row) for row in range(9) for loss in trace.losses[row])[:total]
    for row in range(9):
        count = sum(r == row for _, r in entries)
        assert int(mask[row].sum()) == count * block
        expected = {int(b) * block + i for b in trace.order[row, :count] for i in range(block)}
        assert set(mask[row].nonzero().flatten().tolist()) == expected


def test_a_cheap_last_step_does_not_skip_the_steps_before_it() -> None:
    order = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    trace = EliminationTrace(order, torch.tensor([[5.0, 1.0, 9.0]]), torch.zeros(1, 3))
    assert trace.mask(1 / 3).tolist() == [[False, False, True]]  # one loss counts, the first step is taken


@pytest.mark.parametrize("shape", [(1, 20), (6, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("options", [{}, {"pattern": (1, 2)}, {"block": 4}], ids=["all", "1:2", "1x4"])
def test_smallest_layers(shape: tuple[int, int], options: dict) -> None:
    weight, _, inverse = problem(*shape)
    trace = eliminate(weight, inverse, **options)
    assert trace.settled.shape == shape
    assert trace.losses.isfinite().all()


def test_all_zero_weights_and_repeated_columns() -> None:
    weight, hessian, _ = problem(3, 12)
    hessian[:, 5], hessian[5, :] = hessian[:, 4], hessian[4, :]
    hessian[5, 5] = hessian[4, 4]
    hessian += 1e-6 * torch.eye(12, dtype=torch.float64)
    weight[1] = 0
    trace = eliminate(weight, torch.linalg.inv(hessian))
    assert trace.losses.isfinite().all()
    assert not trace.losses[1].any()
    first = trace.order[0].tolist()
    assert min(first.index(4), first.index(5)) < 3  # of two equal columns one costs nothing


def obq_row(weight: Tensor, inverse: Tensor, grid: Grid) -> tuple[Tensor, float]:
    """OBQ of one row with its outlier rule, directly from the formulas."""
    weight, inverse = weight.clone(), inverse.clone()
    open_, loss = list(range(len(weight))), 0.0
    while open_:
        rounded = grid.dequantize(grid.quantize(weight.unsqueeze(0))).squeeze(0)
        error = weight - rounded
        chosen = min(open_, key=lambda j: float(error[j] ** 2 / inverse[j, j]))
        far = [j for j in open_ if float(error[j] ** 2) > 0.25 * float(grid.scale[0, 0]) ** 2 * (1 + 1e-5)]
        if far:
            chosen = max(far, key=lambda j: float(error[j] ** 2))
        loss += float(error[chosen] ** 2 / inverse[chosen, chosen]) / 2
        weight -= inverse[:, chosen] * error[chosen] / inverse[chosen, chosen]
        weight[chosen] = rounded[chosen]
        inverse -= torch.outer(inverse[:, chosen], inverse[chosen]) / inverse[chosen, chosen]
        open_.remove(chosen)
    return weight, loss


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grid_projection_equals_the_plain_loop(bits: int) -> None:
    weight, hessian, inverse = problem(5, 50)
    args = QuantArgs(bits=bits, symmetric=False, strategy="channel", group_size=None)
    grid = Grid.fit(weight, args)
    trace = eliminate(weight, inverse, GridProjection(grid))
    for row in range(5):
        own = Grid(grid.scale[row : row + 1], grid.zero[row : row + 1], args)
        expected, loss = obq_row(weight[row], inverse, own)
        assert torch.allclose(trace.settled[row], expected, atol=1e-9)
        assert float(trace.losses[row].sum()) == pytest.approx(loss, rel=1e-6)
        delta = weight[row] - trace.settled[row]
        assert float(delta @ hessian @ delta) / 2 == pytest.approx(loss, rel=1e-6)


def test_own_inverses_per_row() -> None:
    weight, _, inverse = problem(4, 20)
    shared = eliminate(weight, inverse)
    own = eliminate(weight, inverse.expand(4, -1, -1).contiguous(), rows_at_once=3)
    assert torch.equal(shared.order, own.order)


def test_blocks_cannot_be_combined_with_a_pattern() -> None:
    weight, _, inverse = problem(2, 8)
    with pytest.raises(ValueError, match="cannot be combined with a projection or a pattern"):
        eliminate(weight, inverse, pattern=(2, 4), block=4)

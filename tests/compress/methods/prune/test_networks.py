"""OBD and OBS on whole networks: the curvature against autograd, the surgeon against quadratics and brute force."""

from collections import OrderedDict
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

from lmpress.compress.methods.prune import obd, obs
from lmpress.compress.solver.curvature import backpropagated_diagonal, fisher_diagonal, ggn_diagonal, recursive_inverse

DOUBLE = torch.float64


def net(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (before, after) in enumerate(pairwise(widths)):
        layers[f"linear{index}"] = nn.Linear(before, after)
        layers[f"tanh{index}"] = nn.Tanh()
    return nn.Sequential(layers).double()


def data(patterns: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(patterns, inputs, generator=generator, dtype=DOUBLE),
        torch.rand(patterns, outputs, generator=generator, dtype=DOUBLE) * 1.6 - 0.8,
    )


def exact_diagonal(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """By differentiating twice; tied parameters count once."""
    values = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return (functional_call(model, parameters, (x,)) - y).square().sum(1).mean()

    blocks = hessian(loss)(values)
    return [blocks[n][n].reshape(p.numel(), p.numel()).diagonal().view_as(p) for n, p in values.items()]


def test_backpropagation_is_exact_for_one_hidden_layer() -> None:
    model, (x, y) = net(4, 6, 3), data(20, 4, 3)
    for ours, exact in zip(backpropagated_diagonal(model, x, y), exact_diagonal(model, x, y), strict=True):
        assert torch.allclose(ours, exact, rtol=1e-8, atol=1e-10)


def test_levenberg_marquardt_form_is_the_gauss_newton_diagonal() -> None:
    model, (x, y) = net(4, 6, 3), data(20, 4, 3)
    lm = backpropagated_diagonal(model, x, y, full=False)
    ggn = ggn_diagonal(list(model.parameters()), (model(row) for row in x))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(lm, ggn, strict=True))
    assert all((a >= 0).all() for a in lm)
    assert any((a < 0).any() for a in backpropagated_diagonal(model, x, 3 * y))


def test_deeper_nets_are_approximated() -> None:
    model, (x, y) = net(5, 8, 8, 2), data(60, 5, 2)
    ours, exact = (
        torch.cat([t.flatten() for t in d]) for d in (backpropagated_diagonal(model, x, y), exact_diagonal(model, x, y))
    )
    assert torch.corrcoef(torch.stack([ours, exact]))[0, 1] > 0.9


def test_shared_weights_are_summed() -> None:
    torch.manual_seed(1)
    shared = nn.Linear(4, 4, bias=False).double()
    tied = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh())
    copies = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh()).double()
    copies[0].weight.data, copies[2].weight.data = shared.weight.data.clone(), shared.weight.data.clone()
    x, y = data(15, 4, 4)
    (ours,) = backpropagated_diagonal(tied, x, y)
    first, second = backpropagated_diagonal(copies, x, y)
    assert torch.allclose(ours, first + second)


def test_relu_has_no_second_derivative() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, y = data(12, 3, 2)
    full, lm = (backpropagated_diagonal(model, x, y, full=form) for form in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(full, lm, strict=True))


def test_fisher_is_the_mean_of_squared_gradients() -> None:
    model, (x, y) = net(4, 5, 2), data(17, 4, 2)
    parameters = list(model.parameters())
    losses = [(model(a) - b).square().sum() for a, b in zip(x, y, strict=True)]
    ours = fisher_diagonal(parameters, losses)

    def loss(values: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return (functional_call(model, values, (a,)) - b).square().sum()

    per_sample = vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), x, y)
    for mine, gradients in zip(ours, per_sample.values(), strict=True):
        assert torch.allclose(mine, gradients.square().mean(0), rtol=1e-8)
        assert not torch.allclose(mine, gradients.mean(0).square(), rtol=0.1)


def test_hutchinson_is_unbiased() -> None:
    model, (x, _) = net(3, 4, 5), data(4, 3, 5)
    parameters = list(model.parameters())
    exact, probed = (
        torch.cat([t.flatten() for t in ggn_diagonal(parameters, (model(row) for row in x), probes)])
        for probes in (None, 2000)
    )
    assert torch.allclose(exact, probed, rtol=0.15, atol=0.02 * float(exact.max()))


def test_obd_in_steps_with_training_between() -> None:
    model, (x, _) = net(6, 10, 1), data(80, 6, 1)
    y = torch.tanh(x[:, :1] - 0.5 * x[:, 1:2])
    parameters = [p for p in model.parameters() if p.ndim == 2]

    def loss() -> Tensor:
        return (model(x) - y).square().sum(1).mean()

    def train(masks: object = None) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss().backward()
            for p, mask in zip(parameters, masks or [], strict=False):
                p.grad.masked_fill_(mask, 0)
            optimizer.step()

    def estimate() -> list[Tensor]:
        return [h for h in backpropagated_diagonal(model, x, y, full=False) if h.ndim == 2]

    train()
    masks = obd.prune_network(parameters, estimate, 0.6, steps=3, retrain=train)
    assert sum(int(m.sum()) for m in masks) == 42  # of 60 + 10
    assert all(not p[m].any() for p, m in zip(parameters, masks, strict=True))
    assert float(loss().detach()) < 0.05 * float(y.square().mean())


def quadratic(width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(3 * width, width, generator=generator, dtype=DOUBLE)
    return torch.randn(width, generator=generator, dtype=DOUBLE), vectors


@pytest.mark.parametrize("alpha", [1e-4, 1e-8])
def test_recursive_inverse_is_the_inverse(alpha: float) -> None:
    """Identity I4."""
    _, vectors = quadratic(30)
    direct = torch.linalg.inv(alpha * torch.eye(30, dtype=DOUBLE) + vectors.T @ vectors / 90)
    assert (recursive_inverse(vectors, alpha)[0] - direct).norm() <= 1e-8 * direct.norm()


def test_inverse_in_blocks() -> None:
    _, vectors = quadratic(10)
    blocks = recursive_inverse(vectors, 1e-3, block=4)
    for index, start in enumerate((0, 4, 8)):
        own = vectors[:, start : start + 4]
        direct = torch.linalg.inv(1e-3 * torch.eye(own.shape[1], dtype=DOUBLE) + own.T @ own / 30)
        assert torch.allclose(blocks[index][: own.shape[1], : own.shape[1]], direct, rtol=1e-8)


def test_scores_are_true_losses_of_a_quadratic() -> None:
    """Identity I3, and the greedy choice against every subset."""
    weight, vectors = quadratic(9)
    matrix = 1e-4 * torch.eye(9, dtype=DOUBLE) + vectors.T @ vectors / 27
    pruned = weight.clone()
    deleted = obs.prune_network(pruned, lambda w: vectors, 4, alpha=1e-4)
    delta = weight - pruned
    loss = float(delta @ matrix @ delta) / 2
    assert sum(deleted.losses) == pytest.approx(loss, rel=1e-10)
    assert not pruned[deleted.order].any()

    def best(gone: tuple[int, ...]) -> float:
        kept = [j for j in range(9) if j not in gone]
        solution = torch.zeros(9, dtype=DOUBLE)
        solution[kept] = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ weight)
        return float((weight - solution) @ matrix @ (weight - solution)) / 2

    assert deleted.losses[0] == pytest.approx(min(best((j,)) for j in range(9)), rel=1e-9)
    assert best(tuple(deleted.order)) == pytest.approx(loss, rel=1e-9)
    assert loss >= min(best(gone) for gone in combinations(range(9), 4)) * (1 - 1e-9)


def test_a_redundant_large_weight_goes_before_a_small_needed_one() -> None:
    """What magnitude and OBD get wrong: two inputs are almost the same, so one of their large weights costs nothing."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 3, generator=generator, dtype=DOUBLE)
    x[:, 1] = x[:, 0] + 0.01 * torch.randn(200, generator=generator, dtype=DOUBLE)
    weight = torch.tensor([2.0, 2.0, 0.5], dtype=DOUBLE)
    deleted = obs.prune_network(weight, lambda w: x, 1)
    assert deleted.order[0] in (0, 1)
    assert weight[1 - deleted.order[0]] == pytest.approx(4.0, abs=0.1)


def test_recomputing_and_stopping() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 5, dtype=DOUBLE)
    first = torch.randn(4, 5, dtype=DOUBLE)
    target = torch.tanh(x @ first.T).sum(1)

    def output(w: Tensor, row: Tensor) -> Tensor:
        return torch.tanh(row @ w.view(4, 5).T).sum()

    def gradients(w: Tensor) -> Tensor:
        return vmap(torch.func.grad(output), in_dims=(None, 0))(w, x)

    def error(w: Tensor) -> float:
        return float((torch.tanh(x @ w.view(4, 5).T).sum(1) - target).square().mean()) / 2

    ends = []
    for every in (None, 1):
        w = first.flatten().clone()
        obs.prune_network(w, gradients, 8, recompute_every=every)
        assert int((w == 0).sum()) == 8
        ends.append(error(w))
    assert ends[1] < ends[0]
    w = first.flatten().clone()
    stopped = obs.prune_network(w, gradients, 20, recompute_every=1, stop=0.5, error=lambda w: 0.01 + error(w))
    assert 0 < len(stopped.order) < 20
    assert int((w == 0).sum()) == len(stopped.order)

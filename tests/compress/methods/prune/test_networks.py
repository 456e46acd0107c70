"""OBD and OBS on whole networks: the curvature against autograd, OBS against quadratics and brute force."""

import re
from collections import OrderedDict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

import lmpress
from lmpress.calibrate.statistics.curvature import (
    backpropagated_diagonal,
    cross_entropy_root,
    fisher_diagonal,
    ggn_diagonal,
    recursive_inverse,
    squared_error_root,
)
from lmpress.compress.methods.prune.networks import delete_weights
from lmpress.errors import UsageError

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
    outputs = [model(row) for row in x]
    ggn = ggn_diagonal(list(model.parameters()), [(output, squared_error_root(output)) for output in outputs])
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


def test_the_cross_entropy_root_is_a_root_of_its_hessian() -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    root = cross_entropy_root(logits)
    expected = hessian(lambda values: nn.functional.cross_entropy(values, torch.tensor(2)))(logits)
    assert torch.allclose(root.T @ root, expected, atol=1e-12)


def test_gauss_newton_is_exact_for_a_linear_classifier() -> None:
    """The logits are linear in the weights, so nothing of the Hessian is left out."""
    model, (x, _) = nn.Sequential(nn.Linear(4, 3)).double(), data(9, 4, 3)
    labels = torch.arange(9) % 3
    outputs = [model(row) for row in x]
    ours = ggn_diagonal(list(model.parameters()), [(output, cross_entropy_root(output)) for output in outputs])

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), labels)

    values = dict(model.named_parameters())
    blocks = hessian(loss)(values)
    for mine, (name, p) in zip(ours, values.items(), strict=True):
        assert torch.allclose(mine, blocks[name][name].reshape(p.numel(), -1).diagonal().view_as(p), atol=1e-12)


@pytest.mark.parametrize("estimate", ["fisher", "gauss-newton", "backpropagated", "levenberg-marquardt"])
def test_obd_in_steps_with_training_between(estimate: str) -> None:
    model, (x, _) = net(6, 10, 1), data(80, 6, 1)
    y = torch.tanh(x[:, :1] - 0.5 * x[:, 1:2])

    def loss() -> Tensor:
        return (model(x) - y).square().sum(1).mean()

    def train(masks: dict[str, Tensor]) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss().backward()
            for name, mask in masks.items():
                model.get_parameter(name).grad.masked_fill_(mask, 0)
            optimizer.step()

    train({})
    options = {"estimate": estimate, "steps": 3, "retrain": train}
    masks = lmpress.optimal_brain_damage(model, [(x[:50], y[:50]), (x[50:], y[50:])], 0.6, **options)
    assert masks.keys() == {"linear0.weight", "linear1.weight"}
    assert sum(int(m.sum()) for m in masks.values()) == 42  # of 60 + 10
    assert all(not model.get_parameter(name)[mask].any() for name, mask in masks.items())
    assert float(loss().detach()) < 0.05 * float(y.square().mean())


def test_obd_takes_what_costs_least_by_the_diagonal() -> None:
    """One linear layer with independent inputs: the saliency is the true loss of each weight."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    model[0].weight.data = torch.tensor([[3.0, 1.0, 2.0, 0.5]], dtype=DOUBLE)
    x = torch.diag(torch.tensor([0.1, 4.0, 1.0, 1.0], dtype=DOUBLE))
    masks = lmpress.optimal_brain_damage(model, [(x, model(x).detach())], 0.5, estimate="gauss-newton")
    assert masks["0.weight"].tolist() == [[True, False, False, True]]


def test_parameters_in_keep_are_not_pruned() -> None:
    x, y = data(10, 4, 2)
    for prune in (lmpress.optimal_brain_damage, lmpress.optimal_brain_surgeon):
        model = net(4, 6, 2)
        before = model[0].weight.detach().clone()
        masks = prune(model, [(x, y)], 0.5, keep=["linear0*"])
        assert masks.keys() == {"linear1.weight"} and int(masks["linear1.weight"].sum()) == 6
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "below 1, got 1.0"),
        ({"estimate": "kfac"}, "unknown estimate 'kfac'"),
        ({"steps": 0}, "at least 1, got 0"),
        ({"keep": ["*"]}, "no weight to prune"),
        ({"estimate": "backpropagated"}, "float targets"),
    ],
    ids=str,
)
def test_obd_refuses_arguments_that_do_not_fit(arguments: dict, message: str) -> None:
    model, (x, _) = net(4, 6, 3), data(9, 4, 3)
    with pytest.raises(UsageError, match=message):
        lmpress.optimal_brain_damage(model, [(x, torch.arange(9) % 3)], **{"sparsity": 0.5, **arguments})


def test_obs_refuses_a_hessian_that_is_too_large() -> None:
    model = nn.Sequential(nn.Linear(200, 101))
    with pytest.raises(UsageError, match="20200 weights"):
        lmpress.optimal_brain_surgeon(model, [(torch.zeros(1, 200), torch.zeros(1, 101))], 0.5)


def trained_classifier() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A net that separates three clusters, with inputs of which half are noise."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(90) % 3
    x = torch.randn(90, 8, generator=generator, dtype=DOUBLE) * 0.7
    x[:, :3] += 2.0 * nn.functional.one_hot(labels, 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model, x, labels


def test_classifiers_lose_less_than_by_magnitude() -> None:
    """Cross entropy on class labels: OBD's saliency and OBS's compensation against the smallest weights."""

    def damage(prune: object) -> float:
        model, x, labels = trained_classifier()
        prune(model, [(x, labels)])
        zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
        assert zeros == 66  # of 96 + 36
        return float(nn.functional.cross_entropy(model(x), labels).detach())

    def magnitude(model: nn.Sequential, batches: object) -> None:
        weights = [p for p in model.parameters() if p.ndim > 1]
        limit = torch.cat([w.detach().abs().flatten() for w in weights]).kthvalue(66).values
        for weight in weights:
            weight.data.masked_fill_(weight.abs() <= limit, 0)

    obd = damage(lambda model, batches: lmpress.optimal_brain_damage(model, batches, 0.5, estimate="gauss-newton"))
    obs = damage(lambda model, batches: lmpress.optimal_brain_surgeon(model, batches, 0.5, recompute_every=10))
    assert max(obd, obs) < damage(magnitude)


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
    deleted = delete_weights(pruned, lambda w: vectors, 4, alpha=1e-4)
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
    deleted = delete_weights(weight, lambda w: x, 1)
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
        delete_weights(w, gradients, 8, every=every)
        assert int((w == 0).sum()) == 8
        ends.append(error(w))
    assert ends[1] < ends[0]
    w = first.flatten().clone()
    stopped = delete_weights(w, gradients, 20, every=1, limit=lambda w: 0.005 + error(w) / 2)
    assert 0 < len(stopped.order) < 20
    assert int((w == 0).sum()) == len(stopped.order)


def test_obs_predicts_the_loss_of_a_linear_network() -> None:
    """Squared errors of a linear layer are quadratic: the best deletion by brute force, and `stop` in units of the loss."""
    x, noise = data(40, 3, 2)
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    y = (model(x) + 0.1 * noise).detach()

    def loss(weight: Tensor) -> float:
        return float((x @ weight.T - y).square().sum(1).mean())

    solution = torch.linalg.lstsq(x, y).solution.T.contiguous()
    model[0].weight.data = solution.clone()  # at the minimum, as the method assumes
    costs = []
    for index in range(6):
        row, column = divmod(index, 3)
        kept = [j for j in range(3) if j != column]
        weight = solution.clone()
        weight[row, column] = 0
        weight[row, kept] = torch.linalg.lstsq(x[:, kept], y[:, row]).solution
        costs.append(loss(weight))
    stopped = lmpress.optimal_brain_surgeon(model, [(x, y)], 0.9, stop=0.99 * (min(costs) / loss(solution) - 1))
    assert not stopped["0.weight"].any()
    masks = lmpress.optimal_brain_surgeon(model, [(x, y)], 1 / 6, alpha=1e-10)
    assert int(masks["0.weight"].flatten().long().argmax()) == costs.index(min(costs))
    assert loss(model[0].weight.detach()) == pytest.approx(min(costs), rel=1e-6)


@pytest.mark.parametrize("page", ["obd", "obs", "exactobs"])
def test_the_examples_of_the_documentation_run(page: str) -> None:
    text = (Path(__file__).parents[4] / f"docs/methods/{page}.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    values: dict[str, Any] = {}
    exec(example, values)
    weights = dict(values["model"].named_parameters())
    masks = {key if key in weights else f"{key}.weight": mask for key, mask in values["masks"].items()}
    assert masks and all(mask.any() and not weights[key][mask].any() for key, mask in masks.items())

"""OBD and OBS as published: prune a whole network by the second derivatives of its own loss.

For classifiers and other small networks, whose loss can be differentiated pattern by pattern. `batches` are pairs
`(inputs, targets)`: integer targets `[patterns]` are classes and the loss of a pattern is the cross entropy; float targets
`[patterns, outputs]` give the sum of squared errors. All parameters with at least two dimensions compete for one budget;
biases and norms stay. See `calibrate/statistics/curvature.py` for the estimators.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....calibrate.statistics.curvature import (
    backpropagated_diagonal,
    cross_entropy_root,
    fisher_diagonal,
    ggn_diagonal,
    recursive_inverse,
    squared_error_root,
)
from ....errors import UsageError
from ....recipes.scheme.prune_args import layer_zeros
from .masks import lowest
from .obd import saliency

Batches = Sequence[tuple[Tensor, Tensor]]
Retrain = Callable[[dict[str, Tensor]], None]
Estimate = Literal["fisher", "gauss-newton", "backpropagated", "levenberg-marquardt"]
LARGEST = 20_000  # weights whose inverse Hessian is held as one matrix (3.2 GB)


def optimal_brain_damage(
    model: nn.Module,
    batches: Batches,
    sparsity: float,
    *,
    estimate: Estimate = "fisher",
    steps: int = 1,
    retrain: Retrain | None = None,
    keep: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Prune `model` in place by the saliency `h_kk w_k^2 / 2`; returns what is pruned, bool, by parameter name.

    In each of `steps` the density shrinks by the same factor: the diagonal `h` is estimated on `batches`, the least salient
    weights are zeroed, and `retrain(masks)` may train what is left (LeCun, Denker, Solla 1990). Parameters whose name matches
    a pattern of `keep` stay as they are. The model is in eval mode while `h` is estimated, and at the end.

    fisher               the mean of squared gradients: any model
    gauss-newton         one backward pass per output and pattern; never negative
    backpropagated       LeCun's recursion: chains of linear layers and elementwise activations, squared errors
    levenberg-marquardt  the same without second derivatives of the activations; never negative

    Raises `UsageError` if the sparsity is not between 0 and 1, if nothing can be pruned, or if `estimate` does not fit.
    """
    named = _weights(model, keep, sparsity)
    if estimate not in get_args(Estimate):
        raise UsageError(f"unknown estimate {estimate!r}", f"use one of: {', '.join(get_args(Estimate))}")
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}", "use 1 to prune everything at once")
    masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in named.items()}
    sizes = [weight.numel() for weight in named.values()]
    for step in range(1, steps + 1):
        diagonals = _diagonals(model.eval(), list(named.values()), batches, estimate)
        scores = torch.cat([saliency(w.detach(), h).flatten() for w, h in zip(named.values(), diagonals, strict=True)])
        gone = torch.cat([mask.flatten() for mask in masks.values()])
        count = layer_zeros(sum(sizes), 1 - (1 - sparsity) ** (step / steps))
        chosen = lowest(scores.masked_fill(gone, -1.0).unsqueeze(0), count).squeeze(0).split(sizes)
        masks = {name: part.view_as(named[name]) for name, part in zip(named, chosen, strict=True)}
        _clear(named, masks)
        if retrain is not None:
            retrain(masks)
            _clear(named, masks)
    model.eval()
    return masks


@dataclass(frozen=True)
class Deleted:
    """What was deleted: the numbers of the weights in order of deletion, and the predicted loss `L_q` of each."""

    order: list[int]
    losses: list[float]


def optimal_brain_surgeon(
    model: nn.Module,
    batches: Batches,
    sparsity: float,
    *,
    block: int | None = None,
    alpha: float = 1e-4,
    recompute_every: int | None = None,
    stop: float | None = None,
    keep: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Delete weights of `model` in place one by one, the cheapest first, and compensate each deletion with the others.

    The Hessian is `alpha I` plus the mean over the patterns of `batches` of `2 sum_k v_k v_k^T`, with `v_k` the gradient of
    output `k`, for squared errors (Hassibi, Stork 1993), and of `v v^T`, with `v` the gradient of the loss, for classes. It is
    computed again every `recompute_every` deletions. With `block`, weights compensate each other in blocks of that many
    neighbours, and memory is `8 * block` bytes per weight. With `stop`, pruning ends before `sparsity` if the cheapest
    deletion would cost more than `stop` times the mean loss. Parameters whose name matches a pattern of `keep` stay as they
    are. Returns what is pruned, bool, by parameter name; the model is in eval mode at the end.

    Raises `UsageError` if the sparsity is not between 0 and 1, if nothing can be pruned, or if there are too many weights for
    one Hessian.
    """
    named = _weights(model, keep, sparsity)
    weights = torch.cat([weight.detach().flatten() for weight in named.values()]).double()
    if (block or len(weights)) > LARGEST:
        raise UsageError(f"a Hessian of {block or len(weights)} weights does not fit into memory", "give block=64")
    model.eval()

    def gradients(values: Tensor) -> Tensor:
        _put(named, values)
        return _gradients(model, list(named.values()), batches)

    def loss(values: Tensor) -> float:
        _put(named, values)
        with torch.no_grad():
            losses = [_losses(model(x), y) for x, y in batches]
        return float(torch.cat(losses).double().mean())

    count = layer_zeros(len(weights), sparsity)
    limit = None if stop is None else lambda values: stop * loss(values)
    deleted = delete_weights(weights, gradients, count, alpha=alpha, block=block, every=recompute_every, limit=limit)
    _put(named, weights)
    flat = torch.zeros_like(weights, dtype=torch.bool)
    flat[deleted.order] = True
    parts = flat.split([weight.numel() for weight in named.values()])
    return {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}


@torch.no_grad()
def delete_weights(
    weights: Tensor,
    gradients: Callable[[Tensor], Tensor],
    count: int,
    *,
    alpha: float = 1e-4,
    block: int | None = None,
    every: int | None = None,
    limit: Callable[[Tensor], float] | None = None,
) -> Deleted:
    """Delete up to `count` of the `weights` float64 `[n]` in place: `L_q = w_q^2 / (2 [H^-1]_qq)`, smallest first.

    `gradients(weights)` gives `v` `[P, n]`, one row per pattern and output. The inverse of `alpha I + 1/P sum v v^T` is
    updated after each deletion, and computed again after `every` of them (a fixed one misleads on networks that are far from
    quadratic). Stops if the cheapest deletion would cost more than `limit(weights)`.
    """
    kept = torch.ones_like(weights, dtype=torch.bool)
    deleted = Deleted([], [])
    inverse = _inverse(gradients, weights, kept, alpha, block)
    size = inverse.shape[-1]
    for step in range(count):
        if every and step and step % every == 0:
            inverse = _inverse(gradients, weights, kept, alpha, block)
        diagonal = inverse.diagonal(dim1=1, dim2=2).flatten()[: len(weights)]
        scores = (weights.square() / (2 * diagonal)).masked_fill(~kept, torch.inf)
        chosen = int(scores.argmin())
        if limit is not None and float(scores[chosen]) > limit(weights):
            break
        part, inside = divmod(chosen, size)
        own = inverse[part]
        span = slice(part * size, min((part + 1) * size, len(weights)))
        column = own[:, inside].clone()
        weights[span] -= (weights[chosen] / column[inside] * column)[: span.stop - span.start]
        own -= torch.outer(column, column) / column[inside]
        own[inside, inside] = 1.0  # the deleted weight no longer takes part
        kept[chosen] = False
        weights[~kept] = 0.0
        deleted.order.append(chosen)
        deleted.losses.append(float(scores[chosen]))
    return deleted


def _inverse(
    gradients: Callable[[Tensor], Tensor], weights: Tensor, kept: Tensor, alpha: float, block: int | None
) -> Tensor:
    """The inverse for the weights that are left: the gradients of deleted ones do not count."""
    with torch.enable_grad():
        vectors = gradients(weights)
    return recursive_inverse(vectors.double() * kept, alpha, block)


def _weights(model: nn.Module, keep: Iterable[str], sparsity: float) -> dict[str, nn.Parameter]:
    """The parameters that are pruned, by name."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity must be at least 0 and below 1, got {sparsity}", "use a share such as 0.5")
    patterns = list(keep)
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in patterns)
    }
    if not found:
        raise UsageError(f"{type(model).__name__} has no weight to prune", "keep fewer parameters")
    return found


def _diagonals(model: nn.Module, weights: list[nn.Parameter], batches: Batches, estimate: Estimate) -> list[Tensor]:
    if estimate == "fisher":
        return fisher_diagonal(weights, (loss for x, y in _patterns(batches) for loss in _losses(model(x), y)))
    if estimate == "gauss-newton":
        roots = (
            (output, cross_entropy_root(output) if _are_classes(y) else squared_error_root(output))
            for x, y in _patterns(batches)
            for output in model(x)
        )
        return ggn_diagonal(weights, roots)
    if not isinstance(model, nn.Sequential) or any(_are_classes(y) for _, y in batches):
        raise UsageError(
            f"the estimate {estimate} needs an nn.Sequential of linear layers and activations, and float targets",
            "use fisher or gauss-newton",
        )
    inputs, targets = (torch.cat(list(part)) for part in zip(*batches, strict=True))
    found = backpropagated_diagonal(model, inputs, targets, full=estimate == "backpropagated")
    by_parameter = dict(zip(model.parameters(), found, strict=True))
    return [by_parameter[weight] for weight in weights]


def _gradients(model: nn.Module, weights: list[nn.Parameter], batches: Batches) -> Tensor:
    """`[P, n]`, one row per pattern and output (classes: per pattern), scaled so that the mean of `v v^T` is the Hessian."""
    rows = []
    for x, y in _patterns(batches):
        outputs = model(x).flatten()
        values = _losses(outputs.unsqueeze(0), y) if _are_classes(y) else outputs * (2 * len(outputs)) ** 0.5
        for value in values:
            gradients = torch.autograd.grad(value, weights, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    return torch.stack(rows)


def _patterns(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pattern by itself, as a batch of one."""
    for inputs, targets in batches:
        yield from zip(inputs.split(1), targets.split(1), strict=True)


def _losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each pattern, `[patterns]`."""
    if _are_classes(targets):
        return F.cross_entropy(outputs, targets, reduction="none")
    return (outputs - targets).square().flatten(1).sum(1)


def _are_classes(targets: Tensor) -> bool:
    return not targets.is_floating_point()


@torch.no_grad()
def _clear(named: dict[str, nn.Parameter], masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        named[name].masked_fill_(mask, 0)


@torch.no_grad()
def _put(named: dict[str, nn.Parameter], values: Tensor) -> None:
    """Write the flat `values` into the parameters."""
    parts = values.split([weight.numel() for weight in named.values()])
    for weight, part in zip(named.values(), parts, strict=True):
        weight.copy_(part.view_as(weight))

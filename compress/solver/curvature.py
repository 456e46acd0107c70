"""Second derivatives of a network's own loss: the diagonals of OBD and the inverse outer-product Hessian of OBS.

For networks and language models small enough to be differentiated as a whole. The layer objective of the other methods
needs none of this: its Hessian is a statistic of the inputs.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def backpropagated_diagonal(net: nn.Sequential, inputs: Tensor, targets: Tensor, full: bool = True) -> list[Tensor]:
    """Diagonal of the Hessian of `mean over patterns of sum (target - output)^2`, one tensor per distinct parameter.

    `net` is a chain of `nn.Linear` and elementwise activations; `inputs` `[patterns, in]`, `targets` `[patterns, out]`. The
    recursion of LeCun, Denker and Solla (1990), exact for one hidden layer, drops off-diagonal terms between deeper ones.
    `full` False leaves out the second derivatives of the activations (Levenberg-Marquardt: never negative). Parameters that
    several layers share have the sum of what each would have; the order is that of `net.parameters()`.
    """
    found: dict[Tensor, Tensor] = {parameter: torch.zeros_like(parameter) for parameter in net.parameters()}
    values = [inputs]
    with torch.no_grad():
        for module in net:
            values.append(module(values[-1]))
        gradient, curvature = 2 * (values[-1] - targets), torch.full_like(targets, 2.0)
        for module, value in zip(reversed(net), reversed(values[:-1]), strict=True):
            if isinstance(module, nn.Linear):
                found[module.weight] += curvature.T @ value.square() / len(inputs)
                if module.bias is not None:
                    found[module.bias] += curvature.mean(0)
                gradient, curvature = gradient @ module.weight, curvature @ module.weight.square()
            else:
                first, second = _derivatives(module, value)
                curvature = first.square() * curvature + (second * gradient if full else 0)
                gradient = first * gradient
    return list(found.values())


def fisher_diagonal(parameters: Sequence[Tensor], losses: Iterable[Tensor]) -> list[Tensor]:
    """Empirical Fisher diagonal: the mean over samples of the squared gradient, one scalar loss per sample.

    The gradient of a batch's mean squared is something else, and much smaller.
    """
    total, samples = [torch.zeros_like(p) for p in parameters], 0
    for loss in losses:
        for so_far, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            so_far.add_(gradient.square())
        samples += 1
    return [sum_ / max(samples, 1) for sum_ in total]


def ggn_diagonal(
    parameters: Sequence[Tensor], outputs: Iterable[Tensor], probes: int | None = None, seed: int = 0
) -> list[Tensor]:
    """Gauss-Newton diagonal of a squared loss: the mean over samples of `2 sum_k (d output_k / d w)^2`.

    `outputs` are one vector `[k]` per sample. One backward pass per output is exact; with `probes`, that many random sign
    vectors per sample estimate it without bias (Hutchinson).
    """
    generator = torch.Generator().manual_seed(seed)
    total, samples = [torch.zeros_like(p) for p in parameters], 0
    for output in outputs:
        vectors = torch.eye(len(output)) if probes is None else _signs(probes, len(output), generator)
        for vector in vectors.to(output):
            gradients = torch.autograd.grad(output, parameters, vector, retain_graph=True)
            for so_far, gradient in zip(total, gradients, strict=True):
                so_far.add_(gradient.square(), alpha=2 / (probes or 1))
        samples += 1
    return [sum_ / max(samples, 1) for sum_ in total]


def recursive_inverse(vectors: Tensor, alpha: float, block: int | None = None) -> Tensor:
    """Inverse of `alpha I + 1/P sum_p v_p v_p^T` by rank-1 updates: OBS (Hassibi, Stork 1993), blocks as in WoodFisher.

    `vectors` float64 `[P, n]`: gradients of the output or of the loss, one per pattern (and output). Gives `[blocks, b, b]`
    for `b` neighbouring weights each (all of them without `block`; absent ones of a last block are independent).
    """
    count, width = vectors.shape
    size = width if block is None else min(block, width)
    parts = torch.nn.functional.pad(vectors, (0, -width % size)).unflatten(1, (-1, size))
    inverse = torch.eye(size, dtype=vectors.dtype, device=vectors.device).div(alpha).repeat(parts.shape[1], 1, 1)
    for vector in parts:
        moved = (inverse @ vector.unsqueeze(2)).squeeze(2)  # [blocks, b]
        scale = count + (vector * moved).sum(1)
        inverse.baddbmm_((moved / scale.unsqueeze(1)).unsqueeze(2), moved.unsqueeze(1), alpha=-1)
    return inverse


def _derivatives(activation: nn.Module, value: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of an elementwise function at `value`."""
    with torch.enable_grad():
        at = value.detach().requires_grad_()
        (first,) = torch.autograd.grad(activation(at).sum(), at, create_graph=True)
        if not first.requires_grad:  # piecewise linear
            return first, torch.zeros_like(first)
        (second,) = torch.autograd.grad(first.sum(), at, allow_unused=True)
    return first.detach(), torch.zeros_like(first) if second is None else second


def _signs(count: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count, width), generator=generator) * 2.0 - 1

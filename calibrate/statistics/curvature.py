"""Second derivatives of a network's own loss: the diagonals of OBD and the inverse outer-product Hessian of OBS.

For networks that are small enough to be differentiated pattern by pattern. The other methods use the layer objective, whose
Hessian is a statistic of the inputs.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def backpropagated_diagonal(net: nn.Sequential, inputs: Tensor, targets: Tensor, full: bool = True) -> list[Tensor]:
    """Diagonal of the Hessian of `mean over patterns of sum (target - output)^2`, one tensor per distinct parameter.

    `net` is a chain of `nn.Linear` and elementwise activations; `inputs` `[patterns, in]`, `targets` `[patterns, out]`. The
    recursion of LeCun, Denker and Solla (1990), exact for one hidden layer, drops off-diagonal terms between deeper ones.
    `full` False leaves out the second derivatives of the activations (Levenberg-Marquardt: never negative). For a
    parameter that several layers share, the terms of these layers are added; the order is that of `net.parameters()`.
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

    Not to be confused with the square of a batch's mean gradient, which is much smaller.
    """
    total, samples = [torch.zeros_like(p) for p in parameters], 0
    for loss in losses:
        for so_far, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            so_far.add_(gradient.square())
        samples += 1
    return [sum_ / max(samples, 1) for sum_ in total]


def ggn_diagonal(parameters: Sequence[Tensor], outputs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Generalized Gauss-Newton diagonal: the mean over samples of `sum_r (sum_k R_rk d output_k / d w)^2`.

    `outputs` are pairs of a sample's output `[k]` and a root `R` `[r, k]`: `R^T R` is the Hessian of its loss with respect to
    the output (`squared_error_root`, `cross_entropy_root`). One backward pass per row of `R`.
    """
    total, samples = [torch.zeros_like(p) for p in parameters], 0
    for output, root in outputs:
        for vector in root:
            gradients = torch.autograd.grad(output, parameters, vector, retain_graph=True)
            for so_far, gradient in zip(total, gradients, strict=True):
                so_far.add_(gradient.square())
        samples += 1
    return [sum_ / max(samples, 1) for sum_ in total]


def squared_error_root(output: Tensor) -> Tensor:
    """`R` `[k, k]` with `R^T R = 2 I`, the Hessian of `sum_k (target_k - output_k)^2` by `output` `[k]`."""
    return torch.eye(len(output), dtype=output.dtype, device=output.device) * 2**0.5


def cross_entropy_root(output: Tensor) -> Tensor:
    """`R` `[k, k]` with `R^T R = diag(p) - p p^T`, the Hessian of the cross entropy by the logits `output` `[k]`."""
    probabilities = output.detach().softmax(0)
    root = probabilities.sqrt()
    return torch.diag(root) - torch.outer(root, probabilities)


def recursive_inverse(vectors: Tensor, alpha: float, block: int | None = None) -> Tensor:
    """Inverse of `alpha I + 1/P sum_p v_p v_p^T` by rank-1 updates: OBS (Hassibi, Stork 1993), blocks as in WoodFisher.

    `vectors` float64 `[P, n]`: gradients of the output or of the loss, one per pattern (and output). Gives `[blocks, b, b]`
    for `b` neighbouring weights each (without `block`, for all of them; a last block is filled up with independent weights).
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

"""Pruning any network of convolutions and linear layers, such as an image classifier, by the layers' own inputs.

A convolution is a linear layer on its unfolded inputs: patches `[tokens, kh * kw * in]`, weights `[out, kh * kw * in]`. The
kernel position is the outer and the input channel the inner index, so that patterns and blocks run along input channels.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from ....calibrate.statistics.hessian import Hessian
from ....errors import UsageError
from ....recipes.scheme import PruneArgs
from ...solver.damped_hessian import damped
from .exactobs import prune as exactobs
from .layers import Prune

Layer = nn.Conv2d | nn.Linear


def prune_classifier(
    model: nn.Module,
    batches: Sequence[Tensor],
    args: PruneArgs,
    prune: Prune = exactobs,
    damping: float = 0.01,
    keep: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Prune the convolutions and linear layers of `model` in place; returns what is pruned, bool, by layer name.

    `batches` are inputs of the model; all statistics come from the network as it was. Layers whose name fits a pattern of
    `keep` stay as they are. Batch norms are left alone: see `retune_batch_norms`. Raises `UsageError` for convolutions that
    are grouped or padded by anything but zeros.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not any(fnmatch(name, pattern) for pattern in keep)
    }
    masks = {}
    for name, hessian in _hessians(model, layers, batches).items():
        weight = as_matrix(layers[name].weight.detach())
        solved = damped(hessian.matrix(), damping)
        pruned_weight, pruned = prune(weight.double().masked_fill(solved.dead, 0), solved, args)
        shape = layers[name].weight.shape
        with torch.no_grad():
            layers[name].weight.copy_(as_weight(pruned_weight, shape))
        masks[name] = as_weight(pruned, shape)
    return masks


@torch.no_grad()
def retune_batch_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of all batch norms by the average over `batches`; the model ends in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def as_matrix(weight: Tensor) -> Tensor:
    """`[out, in, kh, kw]` as `[out, kh * kw * in]`; matrices as they are."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


def as_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_matrix`."""
    if len(shape) != 4:
        return matrix
    return matrix.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


def patches(layer: Layer, inputs: Tensor) -> Tensor:
    """What each output of `layer` sees, `[tokens, columns]`, columns as in `as_matrix`."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UsageError("grouped convolutions and other paddings than zeros are not pruned", "name them in keep")
    unfolded = nn.functional.unfold(
        inputs, layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )  # [batch, in * kh * kw, places]
    places = unfolded.unflatten(1, (layer.in_channels, -1)).transpose(1, 2).flatten(1, 2)
    return places.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def _hessians(model: nn.Module, layers: dict[str, Layer], batches: Sequence[Tensor]) -> dict[str, Hessian]:
    found = {name: Hessian(as_matrix(layer.weight).shape[1], torch.float64) for name, layer in layers.items()}

    def hook(name: str):  # noqa: ANN202
        def gather(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name].update(patches(layers[name], args[0]), len(args[0]))

        return gather

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        model.eval()
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found

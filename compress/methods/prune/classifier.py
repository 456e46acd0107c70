"""Layer-wise pruning of any network of convolutions and linear layers, such as an image classifier.

A convolution is a linear layer on its unfolded inputs: patches `[tokens, kh * kw * in]`, weights `[out, kh * kw * in]`. The
kernel position is the outer and the input channel the inner index, so that patterns and blocks run along input channels.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from ....calibrate.statistics.hessian import Hessian
from ....errors import UsageError
from ....kernels.tensor import PrunedTensor
from ....recipes import schema
from ....recipes.methods import method as registered
from ....recipes.scheme.prune_args import Pruning
from ...block import Block, Linear

Layer = nn.Conv2d | nn.Linear
SEQUENTIAL = ("drift", "true_sequential")  # options that need statistics from pruned layers


def prune_classifier(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    method: str = "exactobs",
    sparsity: float | None = None,
    pattern: str | None = None,
    keep: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    retune: bool = True,
) -> dict[str, Tensor]:
    """Prune the convolutions and linear layers of `model` in place; returns what is pruned, bool, by layer name.

    `batches` are inputs of the model; all statistics come from the network before pruning. `method` is a pruning method of
    `compress prune` and `options` its options, with the scope of `sparsity` (`scope`); `sparsity` is the share of the weights
    that is pruned (0.5 if neither it nor `pattern` is given), a `pattern` such as `2:4` the zeros in every group of input
    channels. Layers whose name matches a pattern of `keep` stay as they are. With `retune`, the running statistics of batch
    norms are replaced by averages over `batches`. The model ends in eval mode.

    Raises `UsageError` if the method does not prune or does not have such options, and for convolutions that are grouped or
    padded by anything but zeros.
    """
    config = _config(method, sparsity, pattern, options or {})
    patterns = list(keep)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not any(fnmatch(name, pattern) for pattern in patterns)
    }
    masks: dict[str, Tensor] = {}
    for name, hessian in _hessians(model, layers, batches).items():
        parameter = layers[name].weight
        weight = as_matrix(parameter.detach())
        args = config.scheme.weights.for_layer(weight.shape[1], parameter.dtype, config.scope)
        linear = Linear(name, weight.float(), args, hessian)
        registered(method).apply(config, Block(name, layers[name], [linear]))
        assert isinstance(linear.result, PrunedTensor)
        with torch.no_grad():
            parameter.copy_(as_weight(linear.result.values, parameter.shape))
        masks[name] = as_weight(~linear.result.kept, parameter.shape)
    if retune:
        retune_batch_norms(model, batches)
    return masks


def _config(method: str, sparsity: float | None, pattern: str | None, options: Mapping[str, Any]) -> Any:
    """The method's options as an instance of its config class."""
    if not isinstance(getattr(registered(method).config, "scheme", None), Pruning):
        raise UsageError(f"the method {method} does not prune", "use exactobs")
    if sparsity is not None and pattern is not None and ":" in pattern:
        raise UsageError("a pattern has its own sparsity", "give sparsity or pattern, not both")
    wrong = [name for name in SEQUENTIAL if name in options]
    if wrong:
        raise UsageError(f"prune_classifier does not support the option {wrong[0]!r}", "leave it out")
    weights = {"sparsity": 0.5 if sparsity is None else sparsity, "pattern": pattern}
    weights |= {name: value for name, value in options.items() if name == "scope"}
    rest = {name: value for name, value in options.items() if name != "scope"}
    content = {"passes": [{"method": method, "scheme": {"weights": weights}, **rest}]}
    return schema.build(content, "prune_classifier").passes[0].config


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
    """The inputs of each output of `layer`, `[tokens, columns]`, columns as in `as_matrix`."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UsageError("convolutions that are grouped or not padded by zeros cannot be pruned", "name them in keep")
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

"""SmoothQuant (Xiao et al. 2022): divide activations by a factor per channel, and multiply the next weights by it.

    s_j = max|X_j|^alpha / max_k|W_kj|^(1 - alpha)

The maximum over the weights includes all consumers of the norm. Channels that are always zero keep s = 1.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ....calibrate.channel_graph.links import ChannelLink, find_channel_links
from ....calibrate.model.architecture import set_weight, weight_of
from ....calibrate.recording import inputs_seen
from ....errors import UsageError
from ....kernels.activations import fake_quantize, grid_of
from ....recipes.scheme import Scheme, inputs_per, signed_weights
from ...block import Block, Linear
from ..quantize.rtn import rounded
from .noise import NoiseModel, minimize_noise
from .recording import module_to_inspect, record
from .rescale import TOLERANCE, Rescale, consumer_weights, expand_channels, fold_or_revert, reduce_channels

SMALLEST = 1e-5  # lower bound of the weights' maximum and of a factor, as published
SCHEME = Scheme(signed_weights("channel"), inputs_per("token", dynamic=True))
CANDIDATES = tuple(step / 20 for step in range(21))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SmoothQuant:
    """Options of SmoothQuant.

    alpha          how much of the activations' range moves into the weights, 0 to 1; `search`: the best of 0, 0.05, ... 1
                   for every group of linears, by the output change of the inspected module under the recipe's quantization;
                   `noise`: the factors with the least rounding noise instead of the power law (noise.py)
    percentile     percentile of |x| that is used as its maximum; below 100, computed from `search_tokens`
    linears        also smooth inputs that are outputs of linears (values to output projection, up to down projection); the
                   published method does not, so outliers there remain
    search_tokens  number of calibration tokens used by `search`, `noise` and the percentile
    """

    alpha: float | Literal["search", "noise"] = 0.5
    percentile: float = 100.0
    linears: bool = True
    search_tokens: int = 8192
    needs: ClassVar[frozenset[str]] = frozenset({"samples"})
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, str) and not 0 <= self.alpha <= 1:
            raise UsageError(
                f"alpha must be between 0 and 1, got {self.alpha}", "use alpha=0.5, alpha=search or alpha=noise"
            )
        if not 0 < self.percentile <= 100:
            raise UsageError(
                f"percentile must be above 0 and at most 100, got {self.percentile}",
                "use 100, or for example 99.9 to ignore outliers",
            )


@torch.no_grad()
def apply(config: SmoothQuant, block: Block) -> None:
    """Smooth the inputs of the block's linears; the inverse factors go into the norms and linears before them."""
    assert block.context is not None
    local = block.local()
    for link in find_channel_links(block.module, *block.context.trial):
        linears = {c.module: local[c.module] for c in link.consumers if c.module in local}
        if not linears or (link.kind == "linear" and not config.linears):
            continue
        activations = reduce_channels(_largest(block, link.consumers[0].module, config), link, "amax")
        largest_weights = torch.stack([w.abs().amax(0) for w in consumer_weights(block.module, link)]).amax(0)
        weights = reduce_channels(largest_weights, link, "amax")
        if config.alpha == "search":
            losses = alpha_losses(block, link, linears, activations, weights, config.search_tokens)
            alpha = min(losses, key=lambda candidate: losses[candidate])
            scale = factors(activations, weights, alpha)
            figures = {
                "smoothquant_alpha": alpha,
                "smoothquant_loss": losses[alpha],
                "smoothquant_half_loss": losses[0.5],
            }
        elif config.alpha == "noise":
            model = _noise_model(block, link, linears, config.search_tokens)
            scale, ratio = minimize_noise(model, factors(activations, weights, 0.5), link)
            figures = {"smoothquant_noise": ratio}
        else:
            scale, figures = factors(activations, weights, config.alpha), {"smoothquant_alpha": config.alpha}
        dtype = block.context.dtypes.get(f"{link.producer}.weight", torch.float32)
        moved = fold_or_revert(block.module, Rescale(link, scale), *block.context.trial, dtype)
        if not moved <= TOLERANCE:
            figures = {"smoothquant_unfolded": moved}
        for linear in linears.values():
            linear.figures |= figures


def factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """The factors s of the formula above `[channels]`, from the largest |x| and |w| per channel; at least 1e-5."""
    scale = activations.pow(alpha) / weights.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where(activations > 0, scale.clamp(min=SMALLEST), 1.0)


def alpha_losses(
    block: Block, link: ChannelLink, linears: dict[str, Linear], activations: Tensor, weights: Tensor, limit: int
) -> dict[float, float]:
    """Mean squared change of the inspected module's output for every candidate alpha, with quantized weights and inputs."""
    producer = block.local().get(link.producer)  # a linear whose rows are divided: its rounding changes too
    name = module_to_inspect(block.module, link, with_producer=producer is not None)
    recording = record(block, name, link.consumers[0].module, limit)
    losses = {}
    for alpha in CANDIDATES:
        scale = factors(activations, weights, alpha)
        columns = expand_channels(scale, link.channels)
        smoothed = recording.inputs / columns
        ends = smoothed.amin(), smoothed.amax()
        with _quantized(block.module, linears, columns, ends), _divided(block.module, link.producer, producer, scale):
            losses[alpha] = recording.loss()
    return losses


def _noise_model(block: Block, link: ChannelLink, linears: dict[str, Linear], limit: int) -> NoiseModel:
    """The noise model of the quantized linears among the link's consumers."""
    assert block.context is not None
    name, first = next(iter(linears.items()))
    inputs = torch.cat([batch[name] for batch in inputs_seen(block.module, block.context.samples(), [name], limit)])
    weight = torch.cat([weight_of(block.module.get_submodule(each)) for each in linears])
    return NoiseModel(inputs.float(), weight.float(), first.inputs, first.grid_args)


@contextmanager
def _divided(block: nn.Module, name: str, linear: Linear | None, scale: Tensor) -> Iterator[None]:
    """While the context is open, a linear that is the producer has the weight `s Q(W / s)`, s per row."""
    if linear is None:
        yield
        return
    module, rows = block.get_submodule(name), scale.unsqueeze(1)
    saved = weight_of(module).clone()
    set_weight(module, rounded(saved / rows, linear.grid_args) * rows)
    try:
        yield
    finally:
        set_weight(module, saved)


@contextmanager
def _quantized(
    block: nn.Module, linears: dict[str, Linear], scale: Tensor, ends: tuple[Tensor, Tensor]
) -> Iterator[None]:
    """While the context is open, the linears compute `Qx(x / s) Q(W s)^T`; `ends` is the range of `x / s`."""
    modules = {block.get_submodule(name): linear for name, linear in linears.items()}
    saved = {module: weight_of(module).clone() for module in modules}

    def quantize_input(linear: Linear) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if linear.inputs is None:
                return (args[0] / scale, *args[1:])
            static = None if linear.inputs.dynamic else grid_of(*ends, linear.inputs)
            return (fake_quantize(args[0] / scale, linear.inputs, static), *args[1:])

        return hook

    with ExitStack() as stack:
        for module, linear in modules.items():
            set_weight(module, rounded(saved[module] * scale, linear.grid_args))
            stack.callback(set_weight, module, saved[module])
            stack.callback(module.register_forward_pre_hook(quantize_input(linear)).remove)
        yield


def _largest(block: Block, name: str, config: SmoothQuant) -> Tensor:
    """The largest |x|, or the percentile of |x|, of every input channel `[width]` of the linear `name`."""
    assert block.context is not None
    limit = None if config.percentile == 100 else config.search_tokens
    batches = inputs_seen(block.module, block.context.samples(), [name], limit)
    if config.percentile == 100:
        return torch.stack([batch[name].abs().amax(0) for batch in batches]).amax(0).float()
    magnitudes = torch.cat([batch[name].abs().float() for batch in batches])
    rank = max(1, round(len(magnitudes) * config.percentile / 100))
    return magnitudes.kthvalue(rank, dim=0).values

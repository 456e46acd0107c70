"""SmoothQuant (Xiao et al. 2022): divide activations by a factor per channel that the next weights take up.

    s_j = max|X_j|^alpha / max_k|W_kj|^(1 - alpha)

The weights' maximum runs over everything that reads the norm. Channels that never fire keep s = 1.
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
from ....recipes.methods import Method, Needs
from ....recipes.scheme import Scheme, inputs_per, signed_weights
from ...block import Block, Linear
from ..quantize.rtn import rounded
from .noise import Rounded, quietest
from .recording import inspected, record
from .rescale import TOLERANCE, Rescale, fed_weights, fold_checked, gather, spread

SMALLEST = 1e-5  # of a weight's maximum and of a factor, as published
SCHEME = Scheme(signed_weights("channel"), inputs_per("token", dynamic=True))
CANDIDATES = tuple(step / 20 for step in range(21))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SmoothQuant:
    """Options of SmoothQuant.

    alpha          how much of the activations' range moves into the weights, 0 to 1; `search`: the best of 0, 0.05, ... 1
                   for every group of linears, by the inspected module's output under the recipe's quantization; `noise`: no
                   power law, but the factors with the least rounding noise (noise.py)
    percentile     of |x| that stands for its maximum; below 100, taken over `search_tokens`
    linears        smooth the inputs that come from linears too (values to output projection, up to down projection); the
                   published method leaves them alone, and with them any outliers there
    search_tokens  calibration tokens that the search, the noise and the percentile see
    """

    alpha: float | Literal["search", "noise"] = 0.5
    percentile: float = 100.0
    linears: bool = True
    search_tokens: int = 8192
    needs: ClassVar[Needs] = Needs(samples=True)
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, str) and not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha {self.alpha} is outside 0..1", "use 0.5, or alpha=search, or alpha=noise")
        if not 0 < self.percentile <= 100:
            raise UsageError(f"percentile {self.percentile} is outside 0..100", "use 100, or 99.9 to ignore outliers")


@torch.no_grad()
def apply(config: SmoothQuant, block: Block) -> None:
    """Smooth the inputs of the block's linears; norms take up the factors."""
    assert block.context is not None
    local = block.local()
    for feed in find_channel_links(block.module, *block.context.trial):
        linears = {c.module: local[c.module] for c in feed.consumers if c.module in local}
        if not linears or (feed.kind == "linear" and not config.linears):
            continue
        activations = gather(_largest(block, feed.consumers[0].module, config), feed, "amax")
        weights = gather(torch.stack([w.abs().amax(0) for w in fed_weights(block.module, feed)]).amax(0), feed, "amax")
        if config.alpha == "search":
            losses = alpha_losses(block, feed, linears, activations, weights, config.search_tokens)
            alpha = min(losses, key=lambda candidate: losses[candidate])
            scale = factors(activations, weights, alpha)
            figures = {
                "smoothquant_alpha": alpha,
                "smoothquant_loss": losses[alpha],
                "smoothquant_half_loss": losses[0.5],
            }
        elif config.alpha == "noise":
            rounded_ones = _rounded_ones(block, feed, linears, config.search_tokens)
            scale, ratio = quietest(rounded_ones, factors(activations, weights, 0.5), feed)
            figures = {"smoothquant_noise": ratio}
        else:
            scale, figures = factors(activations, weights, config.alpha), {"smoothquant_alpha": config.alpha}
        dtype = block.context.dtypes.get(f"{feed.source}.weight", torch.float32)
        moved = fold_checked(block.module, Rescale(feed, scale), *block.context.trial, dtype)
        if not moved <= TOLERANCE:
            figures = {"smoothquant_unfolded": moved}
        for linear in linears.values():
            linear.figures |= figures


def factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """The formula above: largest |x| and largest |w| per channel give s, at least 1e-5."""
    scale = activations.pow(alpha) / weights.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where(activations > 0, scale.clamp(min=SMALLEST), 1.0)


def alpha_losses(
    block: Block, feed: ChannelLink, linears: dict[str, Linear], activations: Tensor, weights: Tensor, limit: int
) -> dict[float, float]:
    """Mean squared change of the inspected module's output for every candidate alpha, weights and inputs quantized."""
    source = block.local().get(feed.source)  # a linear's rows are divided: how it rounds then counts too
    judge = inspected(block.module, feed, with_source=source is not None)
    recording = record(block, judge, feed.consumers[0].module, limit)
    losses = {}
    for alpha in CANDIDATES:
        scale = factors(activations, weights, alpha)
        columns = spread(scale, feed.channels)
        smoothed = recording.inputs / columns
        ends = smoothed.amin(), smoothed.amax()
        with _quantized(block.module, linears, columns, ends), _divided(block.module, feed.source, source, scale):
            losses[alpha] = recording.loss()
    return losses


def _rounded_ones(block: Block, feed: ChannelLink, linears: dict[str, Linear], limit: int) -> Rounded:
    """The inputs and weights of the feed's quantized linears."""
    assert block.context is not None
    name, first = next(iter(linears.items()))
    inputs = torch.cat([batch[name] for batch in inputs_seen(block.module, block.context.samples(), [name], limit)])
    weight = torch.cat([weight_of(block.module.get_submodule(each)) for each in linears])
    return Rounded(inputs.float(), weight.float(), first.inputs, first.grid_args)


@contextmanager
def _divided(block: nn.Module, name: str, linear: Linear | None, scale: Tensor) -> Iterator[None]:
    """Inside the `with` a feeding linear has the weight `s Q(W / s)` (rows)."""
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
    """Inside the `with` the linears compute `Qx(x / s) Q(W s)^T`; `ends` are those of the range of x / s."""
    modules = {block.get_submodule(name): linear for name, linear in linears.items()}
    saved = {module: weight_of(module).clone() for module in modules}

    def rounder(linear: Linear) -> Any:
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
            stack.callback(module.register_forward_pre_hook(rounder(linear)).remove)
        yield


def _largest(block: Block, name: str, config: SmoothQuant) -> Tensor:
    """The largest |x|, or its percentile, of every input channel of the linear `name` `[width]`."""
    assert block.context is not None
    limit = None if config.percentile == 100 else config.search_tokens
    batches = inputs_seen(block.module, block.context.samples(), [name], limit)
    if config.percentile == 100:
        return torch.stack([batch[name].abs().amax(0) for batch in batches]).amax(0).float()
    seen = torch.cat([batch[name].abs().float() for batch in batches])
    rank = max(1, round(len(seen) * config.percentile / 100))
    return seen.kthvalue(rank, dim=0).values


METHOD = Method(SmoothQuant, apply, scheme=SCHEME)

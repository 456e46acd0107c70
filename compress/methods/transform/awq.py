"""AWQ (Lin et al. 2023): scale up the weights of channels with large activations, so that rounding spares them.

    s = mean|x|^a / v^b   (v: the column's mean share of its group's largest weight),   s /= sqrt(max(s) min(s))

`a` runs over a lattice from 0 to 1, `b` is 0 or 1 - a; what moves the output of the inspected module least is folded.
Afterwards weights are clipped, per row and group, to the share of their largest value that moves the output least.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ....calibrate.channel_graph.links import ChannelLink, find_channel_links, query_key_linears
from ....calibrate.model.architecture import set_weight, weight_of
from ....calibrate.recording import inputs_seen
from ....errors import UsageError
from ....kernels.tensor.grid import NOT_GRIDS, encode, fit_groups
from ....recipes.methods import Method, Needs
from ....recipes.scheme import QuantArgs, Scheme
from ...block import Block, Linear
from ..quantize.rtn import rounded
from .recording import Recording, inspected, record
from .rescale import TOLERANCE, Rescale, fold_checked, gather, spread

CLIP_STEPS, CLIP_POINTS = 20, 10  # largest weights of 1, 19/20, ... 11/20 of the original are tried
SMALLEST = 1e-4  # of a factor before it is normalised, as published
ROWS_AT_ONCE = 512
SCHEME = Scheme(QuantArgs(symmetric=False))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AWQ:
    """Options of AWQ.

    ratios         steps of the exponent's lattice 0, 1/ratios, ... 1
    weight_term    also try, for every exponent, to divide by the weights' own term
    clip           search for clipped weights afterwards (leave it off before a quantizer that compensates errors)
    search_tokens  calibration tokens that choices are judged on
    """

    ratios: int = 20
    weight_term: bool = True
    clip: bool = True
    search_tokens: int = 8192
    needs: ClassVar[Needs] = Needs(samples=True)
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.ratios < 1:
            raise UsageError(f"{self.ratios} steps make no lattice", "use ratios=20")
        if self.search_tokens < 1:
            raise UsageError(f"search_tokens {self.search_tokens} is not positive", "use 8192")


@plain_dataclass(frozen=True)
class Choice:
    """One point of the search: exponents of activations and weights, factors per source channel, and the loss."""

    ratio: float
    weight_power: float
    scale: Tensor
    loss: float


@torch.no_grad()
def apply(config: AWQ, block: Block) -> None:
    """Scale, and perhaps clip, the weights of the block's linears; norms and linears that feed them take up the factors."""
    assert block.context is not None
    feeds = find_channel_links(block.module, *block.context.trial)
    for feed in feeds:
        linears = consuming(block, feed)
        if not linears:
            continue
        recording = record(block, inspected(block.module, feed), feed.consumers[0].module, config.search_tokens)
        choices = search(recording, block.module, linears, feed, config)
        best = min(choices, key=lambda choice: choice.loss)  # the first of equals
        figures = {"awq_ratio": best.ratio, "awq_loss": best.loss, "awq_rtn_loss": choices[0].loss}
        dtype = block.context.dtypes.get(f"{feed.source}.weight", torch.float32)
        moved = fold_checked(block.module, Rescale(feed, best.scale), *block.context.trial, dtype)
        if not moved <= TOLERANCE:
            figures = {"awq_unfolded": moved}
        for linear in linears.values():
            linear.figures |= figures
    if config.clip:
        _clip_block(block, query_key_linears(block.module, *block.context.trial, feeds), config.search_tokens)


def consuming(block: Block, feed: ChannelLink) -> dict[str, Linear]:
    """The linears of this stage among the feed's consumers, by their names inside the block."""
    names = {consumer.module for consumer in feed.consumers}
    return {name: linear for name, linear in block.local().items() if name in names}


def search(
    recording: Recording, block: nn.Module, linears: dict[str, Linear], feed: ChannelLink, config: AWQ
) -> list[Choice]:
    """Judge every point of the lattice by rounding the linears' scaled weights. The first point is plain rounding."""
    activations = gather(recording.inputs.abs().mean(0), feed, "mean")
    share = gather(_weight_share(block, linears), feed, "mean")
    choices = []
    for step in range(config.ratios + 1):
        ratio = step / config.ratios
        for power in (0.0, 1 - ratio) if config.weight_term and ratio < 1 else (0.0,):
            scale = factors(activations, share, ratio, power)
            with _rounded(block, linears, spread(scale, feed.channels)):
                choices.append(Choice(ratio, power, scale, recording.loss()))
    return choices


def factors(activations: Tensor, share: Tensor, ratio: float, power: float) -> Tensor:
    """`activations^ratio / share^power`, normalised to `max * min = 1`; channels that never fire are left alone."""
    alive = activations > 0
    scale = activations.pow(ratio).div(share.pow(power).clamp(min=SMALLEST)).clamp(min=SMALLEST)[alive]
    out = torch.ones_like(activations)
    if alive.any():
        out[alive] = scale / (scale.max() * scale.min()).sqrt()
    return out


def _weight_share(block: nn.Module, linears: dict[str, Linear]) -> Tensor:
    """Per column, the mean over all rows of |w| over the largest |w| of its group."""
    total, rows = 0.0, 0
    for name, linear in linears.items():
        weight = weight_of(block.get_submodule(name)).abs()
        groups = weight.unflatten(1, (-1, linear.grid_args.columns_per_scale(weight.shape[1])))
        total = total + (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).sum(0)
        rows += weight.shape[0]
    assert isinstance(total, Tensor)
    return total / rows


@contextmanager
def _rounded(block: nn.Module, linears: dict[str, Linear], scale: Tensor) -> Iterator[None]:
    """The linears' weights are `Q(W * s) / s` inside the `with`."""
    modules = {block.get_submodule(name): linear.grid_args for name, linear in linears.items()}
    saved = {module: weight_of(module).clone() for module in modules}
    for module, args in modules.items():
        set_weight(module, rounded(saved[module] * scale, quick(args)) / scale)
    try:
        yield
    finally:
        for module, weight in saved.items():
            set_weight(module, weight)


def quick(args: QuantArgs) -> QuantArgs:
    """The same grid on the plain range: a search inside a search would take eighty times as long."""
    return replace(args, observer="minmax")


def _clip_block(block: Block, untouched: set[str], limit: int) -> None:
    """Clip every linear but those whose output only steers attention; a scale of a whole tensor cannot be clipped by rows.

    Raises `UsageError` if a linear is to become weights that have no plain grid.
    """
    for linear in block.linears:
        if linear.grid_args.kind in NOT_GRIDS:
            raise UsageError(f"awq cannot clip {linear.name}, which becomes {linear.grid_args.kind}", "use clip=false")
    linears = {
        name: linear
        for name, linear in block.local().items()
        if name not in untouched and linear.grid_args.strategy != "tensor"
    }
    for name, products in _group_products(block, linears, limit).items():
        module = block.module.get_submodule(name)
        weight = weight_of(module)
        limits = clip_limits(weight, products, linears[name].grid_args)
        groups = weight.unflatten(1, (limits.shape[1], -1))
        linears[name].figures["awq_clipped_share"] = float((groups.abs() > limits.unsqueeze(-1)).float().mean())
        bounds = limits.unsqueeze(-1)
        set_weight(module, torch.maximum(torch.minimum(groups, bounds), -bounds).flatten(1))


def _group_products(block: Block, linears: dict[str, Linear], limit: int) -> dict[str, Tensor]:
    """Per linear, `X_g^T X_g` of every group's columns `[groups, n, n]`, summed over the tokens."""
    assert block.context is not None
    products: dict[str, Tensor] = {}
    for batch in inputs_seen(block.module, block.context.samples(), list(linears), limit):
        for name, x in batch.items():
            groups = x.float().unflatten(1, (-1, linears[name].grid_args.columns_per_scale(x.shape[1]))).transpose(0, 1)
            product = groups.transpose(1, 2) @ groups
            products[name] = products[name] + product if name in products else product
    return products


def clip_limits(weight: Tensor, products: Tensor, args: QuantArgs) -> Tensor:
    """The largest magnitude `[out, groups]` left to every group of `weight` `[out, in]`: `absmax * (1 - i/20)`.

    It minimises the squared error of the group's part of the dot product, `d X_g^T X_g d` with `d = Q(clip(w)) - w`;
    `products` `[groups, n, n]` are the `X_g^T X_g`. The widest of equals wins.
    """
    return torch.cat([_limits(rows, products, quick(args)) for rows in _chunks(weight, len(products))])


def _chunks(weight: Tensor, groups: int) -> Iterator[Tensor]:
    for rows in weight.split(ROWS_AT_ONCE):
        yield rows.unflatten(1, (groups, -1))


def _limits(groups: Tensor, products: Tensor, args: QuantArgs) -> Tensor:
    largest = groups.abs().amax(-1)
    best, limits = torch.full_like(largest, torch.inf), largest
    for step in range(CLIP_POINTS):
        limit = largest * (1 - step / CLIP_STEPS)
        bound = limit.unsqueeze(-1)
        clipped = torch.maximum(torch.minimum(groups, bound), -bound)
        scale, zero = fit_groups(clipped, args)
        codes = encode(clipped, scale.unsqueeze(-1), zero.unsqueeze(-1), args)
        difference = codes.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(groups)
        error = torch.einsum("rgn,gnm,rgm->rg", difference, products.to(groups), difference)
        better = error < best
        best, limits = torch.where(better, error, best), torch.where(better, limit, limits)
    return limits


METHOD = Method(AWQ, apply, scheme=SCHEME)

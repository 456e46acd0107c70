"""AWQ (Lin et al. 2023): scale up the weights of channels with large activations, so that rounding affects them less.

    s = mean|x|^a / v^b   (v: the column's mean share of its group's largest weight),   s /= sqrt(max(s) min(s))

`a` takes evenly spaced values from 0 to 1, `b` is 0 or 1 - a; the factors that change the output of the inspected module least
are folded into the weights. Then weights are clipped, per row and group, at the share of their largest magnitude that changes
the output least.
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
from ....kernels.tensor.grid import encode, fit_groups
from ....recipes.scheme import QuantArgs, Scheme
from ...block import Block, Linear
from ..quantize.rtn import rounded
from .recording import Recording, module_to_inspect, record
from .rescale import TOLERANCE, Rescale, expand_channels, fold_or_revert, reduce_channels

CLIP_STEPS, CLIP_POINTS = 20, 10  # clipping at 1, 19/20, ... 11/20 of the largest magnitude is tried
SMALLEST = 1e-4  # lower bound of a factor before it is normalised, as published
ROWS_AT_ONCE = 512
SCHEME = Scheme(QuantArgs(symmetric=False))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class AWQ:
    """Options of AWQ.

    ratios         number of steps of the exponent: 0, 1/ratios, ... 1 are tried
    weight_term    for every exponent, also try `b = 1 - a` (division by the weights' term `v`)
    clip           search for clipping thresholds afterwards (turn it off before a quantizer that compensates errors)
    search_tokens  number of calibration tokens used by the searches
    """

    ratios: int = 20
    weight_term: bool = True
    clip: bool = True
    search_tokens: int = 8192
    needs: ClassVar[frozenset[str]] = frozenset({"samples"})
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.ratios < 1:
            raise UsageError(f"ratios must be at least 1, got {self.ratios}", "use ratios=20")
        if self.search_tokens < 1:
            raise UsageError(f"search_tokens must be at least 1, got {self.search_tokens}", "use search_tokens=8192")


@plain_dataclass(frozen=True)
class Candidate:
    """One point of the search: the exponents `a` and `b`, the factors `[producer channels]`, and the loss."""

    ratio: float
    weight_power: float
    scale: Tensor
    loss: float


@torch.no_grad()
def apply(config: AWQ, block: Block) -> None:
    """Scale and optionally clip the weights of the block's linears; the inverse factors go into their producers."""
    assert block.context is not None
    links = find_channel_links(block.module, *block.context.trial)
    for link in links:
        linears = consumer_linears(block, link)
        if not linears:
            continue
        recording = record(block, module_to_inspect(block.module, link), link.consumers[0].module, config.search_tokens)
        candidates = search_scales(recording, block.module, linears, link, config)
        best = min(candidates, key=lambda candidate: candidate.loss)  # the first one, if several are equal
        figures = {"awq_ratio": best.ratio, "awq_loss": best.loss, "awq_rtn_loss": candidates[0].loss}
        dtype = block.context.dtypes.get(f"{link.producer}.weight", torch.float32)
        moved = fold_or_revert(block.module, Rescale(link, best.scale), *block.context.trial, dtype)
        if not moved <= TOLERANCE:
            figures = {"awq_unfolded": moved}
        for linear in linears.values():
            linear.figures |= figures
    if config.clip:
        _clip_block(block, query_key_linears(block.module, *block.context.trial, links), config.search_tokens)


def consumer_linears(block: Block, link: ChannelLink) -> dict[str, Linear]:
    """The link's consumers that are linears of this stage, by their names inside the block."""
    names = {consumer.module for consumer in link.consumers}
    return {name: linear for name, linear in block.local().items() if name in names}


def search_scales(
    recording: Recording, block: nn.Module, linears: dict[str, Linear], link: ChannelLink, config: AWQ
) -> list[Candidate]:
    """The loss of every pair of exponents, with the linears' scaled weights rounded. The first candidate has no scaling."""
    activations = reduce_channels(recording.inputs.abs().mean(0), link, "mean")
    share = reduce_channels(_weight_share(block, linears), link, "mean")
    candidates = []
    for step in range(config.ratios + 1):
        ratio = step / config.ratios
        for power in (0.0, 1 - ratio) if config.weight_term and ratio < 1 else (0.0,):
            scale = factors(activations, share, ratio, power)
            with _rounded(block, linears, expand_channels(scale, link.channels)):
                candidates.append(Candidate(ratio, power, scale, recording.loss()))
    return candidates


def factors(activations: Tensor, share: Tensor, ratio: float, power: float) -> Tensor:
    """`activations^ratio / share^power` per channel, normalised to `max * min = 1`; 1 for channels that are always zero."""
    alive = activations > 0
    scale = activations.pow(ratio).div(share.pow(power).clamp(min=SMALLEST)).clamp(min=SMALLEST)[alive]
    out = torch.ones_like(activations)
    if alive.any():
        out[alive] = scale / (scale.max() * scale.min()).sqrt()
    return out


def _weight_share(block: nn.Module, linears: dict[str, Linear]) -> Tensor:
    """Per column, the mean over all rows of |w| divided by the largest |w| of its group."""
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
    """While the context is open, the linears' weights are `Q(W * s) / s`."""
    modules = {block.get_submodule(name): linear.grid_args for name, linear in linears.items()}
    saved = {module: weight_of(module).clone() for module in modules}
    for module, args in modules.items():
        set_weight(module, rounded(saved[module] * scale, minmax_args(args)) / scale)
    try:
        yield
    finally:
        for module, weight in saved.items():
            set_weight(module, weight)


def minmax_args(args: QuantArgs) -> QuantArgs:
    """The same grid with observer minmax: the search of observer mse would make this search 80 times as slow."""
    return replace(args, observer="minmax")


def _clip_block(block: Block, query_keys: set[str], limit: int) -> None:
    """Clip every linear except queries and keys (as published) and those with one scale for the whole tensor."""
    linears = {
        name: linear
        for name, linear in block.local().items()
        if name not in query_keys and linear.grid_args.strategy != "tensor"
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
    """Per linear, `X_g^T X_g` `[groups, n, n]` of the n columns of every group, summed over the tokens."""
    assert block.context is not None
    products: dict[str, Tensor] = {}
    for batch in inputs_seen(block.module, block.context.samples(), list(linears), limit):
        for name, x in batch.items():
            groups = x.float().unflatten(1, (-1, linears[name].grid_args.columns_per_scale(x.shape[1]))).transpose(0, 1)
            product = groups.transpose(1, 2) @ groups
            products[name] = products[name] + product if name in products else product
    return products


def clip_limits(weight: Tensor, products: Tensor, args: QuantArgs) -> Tensor:
    """The clipping threshold `[out, groups]` of every group of `weight` `[out, in]`: `absmax * (1 - i/20)`.

    It minimises the squared error of the group's part of the dot product, `d X_g^T X_g d^T` with `d = Q(clip(w)) - w`;
    `products` `[groups, n, n]` are the `X_g^T X_g`. Of equally good thresholds the largest is taken.
    """
    return torch.cat([_limits(rows, products, minmax_args(args)) for rows in _chunks(weight, len(products))])


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

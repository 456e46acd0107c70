"""Smoothing factors with the least rounding noise, instead of a power law.

A value that is rounded with step `D` is off by a random error of variance `D**2 / 12`. Inputs `x / s` `[tokens, width]` rounded
with steps `D_t` and weights `W s` `[out, width]` rounded with steps `d_ig` (row, group) so change the outputs by

    12 N(s) = sum_t D_t**2 * sum_j s_j**2 |W_j|**2  +  sum_g (sum_i d_ig**2) * sum_t |x_tg / s_g|**2

in expectation of the sum of squares. Both steps follow from the largest values, as they do when served.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ....calibrate.channel_graph.links import ChannelLink
from ....kernels.activations import extremes, grid_of
from ....recipes.scheme import QuantArgs
from .rescale import expand_channels

TOKENS = 2048  # that stand for all, evenly expand_channels
STEPS, RATE = 150, 0.05  # of Adam on log s; the rate falls to zero


@dataclass(frozen=True)
class NoiseModel:
    """What is rounded: `inputs` `[tokens, width]`, the `weight` `[out, width]` of all that read them, and how."""

    inputs: Tensor
    weight: Tensor
    input_args: QuantArgs | None
    weight_args: QuantArgs

    def noise(self, columns: Tensor) -> Tensor:
        """`12 N` above for the factors `columns` `[width]`: a number, differentiable."""
        smoothed, scaled = self.inputs / columns, self.weight * columns
        groups = scaled.unflatten(1, (-1, self.weight_args.columns_per_scale(scaled.shape[1])))
        steps = _range_width(groups, self.weight_args) / self.weight_args.maxq
        if self.weight_args.strategy == "tensor":
            steps = steps.amax().expand_as(steps)
        energy = smoothed.square().sum(0).unflatten(0, (groups.shape[1], -1)).sum(1)
        noise = (steps.square().sum(0) * energy).sum()
        if self.input_args is None:
            return noise
        step, _ = grid_of(*extremes(smoothed, self.input_args), self.input_args)
        return noise + step.expand(len(smoothed), 1).square().sum() * scaled.square().sum()


def minimize_noise(rounded: NoiseModel, start: Tensor, link: ChannelLink) -> tuple[Tensor, float]:
    """Factors `[link.size]` of little noise, found from `start` downhill, and their noise relative to that of `start`."""
    stride = -(-len(rounded.inputs) // TOKENS)
    few = NoiseModel(rounded.inputs[::stride], rounded.weight, rounded.input_args, rounded.weight_args)
    logarithm = start.log().requires_grad_(True)
    optimiser = torch.optim.Adam([logarithm], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimiser.zero_grad()
            few.noise(expand_channels(logarithm.exp(), link.channels)).log().backward()
            optimiser.step()
            schedule.step()
    found = logarithm.detach().exp()
    before, after = (float(rounded.noise(expand_channels(scale, link.channels))) for scale in (start, found))
    return (found, after / before) if after < before else (start, 1.0)


def _range_width(groups: Tensor, args: QuantArgs) -> Tensor:
    """The width of every group's range `[..., n]`: `[...]`."""
    return 2 * groups.abs().amax(-1) if args.symmetric else groups.amax(-1) - groups.amin(-1)

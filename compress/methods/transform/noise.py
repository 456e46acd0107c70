"""Smoothing factors with the least rounding noise, instead of a power law.

Rounding with step `D` causes an error of variance `D**2 / 12`. If inputs `x / s` `[tokens, width]` are rounded with steps
`D_t` (token) and weights `W s` `[out, width]` with steps `d_ig` (row, group), the expected sum of squared errors of the
outputs is `N(s)` with

    12 N(s) = sum_t D_t**2 * sum_j s_j**2 |W_j|**2  +  sum_g (sum_i d_ig**2) * sum_t |x_tg / s_g|**2

The steps follow from the largest values, as at run time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ....calibrate.channel_graph.links import ChannelLink
from ....kernels.activations import extremes, grid_of
from ....recipes.scheme import QuantArgs
from .rescale import expand_channels

TOKENS = 2048  # at most this many tokens, evenly spaced, are used by the optimisation
STEPS, RATE = 150, 0.05  # of Adam on log s; the rate decreases to zero


@dataclass(frozen=True)
class NoiseModel:
    """The rounding noise of linears with the same `inputs` `[tokens, width]`.

    `weight` `[out, width]` holds the rows of all of these linears; `input_args` is None if inputs are not quantized.
    """

    inputs: Tensor
    weight: Tensor
    input_args: QuantArgs | None
    weight_args: QuantArgs

    def noise(self, columns: Tensor) -> Tensor:
        """`12 N(s)` of the formula above for the factors `columns` `[width]`: a differentiable scalar."""
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


def minimize_noise(model: NoiseModel, start: Tensor, link: ChannelLink) -> tuple[Tensor, float]:
    """Factors `[link.size]` of low noise, by gradient descent from `start`, and their noise relative to that of `start`."""
    stride = -(-len(model.inputs) // TOKENS)
    sample = NoiseModel(model.inputs[::stride], model.weight, model.input_args, model.weight_args)
    logarithm = start.log().requires_grad_(True)
    optimiser = torch.optim.Adam([logarithm], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimiser.zero_grad()
            sample.noise(expand_channels(logarithm.exp(), link.channels)).log().backward()
            optimiser.step()
            schedule.step()
    found = logarithm.detach().exp()
    before, after = (float(model.noise(expand_channels(scale, link.channels))) for scale in (start, found))
    return (found, after / before) if after < before else (start, 1.0)


def _range_width(groups: Tensor, args: QuantArgs) -> Tensor:
    """The width of the range of every group `[..., n]`: `[...]`."""
    return 2 * groups.abs().amax(-1) if args.symmetric else groups.amax(-1) - groups.amin(-1)

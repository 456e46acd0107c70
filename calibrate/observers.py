"""Observers of activations: the range of a layer's inputs on the calibration rows.

minmax      the smallest and the largest value
average     the moving averages of the batches' smallest and largest values, momentum 0.95, starting with the first batch
            (ZeroQuant)
percentile  the range with `100 - percentile` percent of the values beyond each end
mse         the range around zero that rounds a sample of the values with the least squared error, as for weights
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.tensor.grid import fit_groups
from ..recipes.scheme import QuantArgs

MOMENTUM = 0.95
SAMPLE = 2**16  # about how many values of a batch are sampled: all values of evenly spaced tokens


class Range:
    """The range of one layer's inputs by `args.observer`, updated batch by batch."""

    def __init__(self, args: QuantArgs) -> None:
        self.args = args
        self._ends: tuple[Tensor, Tensor] | None = None
        self._samples: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take in the inputs of one batch `[tokens, width]`, any float dtype."""
        if not x.numel():  # an expert that no token was routed to
            return
        if self.args.observer in ("percentile", "mse"):
            self._samples.append(x[:: -(-x.numel() // SAMPLE)].float().flatten())
            return
        low, high = x.amin().float(), x.amax().float()
        if self._ends is not None and self.args.observer == "average":
            low, high = (
                MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip(self._ends, (low, high), strict=True)
            )
        elif self._ends is not None:
            low, high = torch.minimum(self._ends[0], low), torch.maximum(self._ends[1], high)
        self._ends = low, high

    def ends(self) -> tuple[Tensor, Tensor] | None:
        """Both ends of the range, float32; None if there was no token."""
        if not self._samples:
            return self._ends
        values = torch.cat(self._samples)
        if self.args.observer == "mse":
            scale, zero = fit_groups(values.unsqueeze(0), replace(self.args, scale_dtype="float32"))
            if self.args.symmetric:
                largest = scale[0] * (2 ** (self.args.bits - 1) - 1)
                return -largest, largest
            return -zero[0] * scale[0], (self.args.maxq - zero[0]) * scale[0]
        if self.args.symmetric:
            largest = _percentile(values.abs(), self.args.percentile)
            return -largest, largest
        return -_percentile(-values, self.args.percentile), _percentile(values, self.args.percentile)


def _percentile(values: Tensor, percentile: float) -> Tensor:
    """The `percentile`-th percentile of `values` `[n]`, itself one of the values."""
    return values.kthvalue(max(1, round(len(values) * percentile / 100))).values

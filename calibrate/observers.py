"""Observers of activations: the range of a layer's inputs, from what the layer reads on the calibration rows.

minmax      the smallest and the largest value
average     their moving average over the batches, momentum 0.95, starting at the first batch (ZeroQuant)
percentile  the range outside of which `100 - percentile` percent of the values lie at each end
mse         the range around zero that rounds a sample of the values with the least error, as for weights
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.tensor.grid import fit_groups
from ..recipes.scheme import QuantArgs

MOMENTUM = 0.95
SAMPLE = 2**16  # values of a batch that stand for all of them: whole tokens, evenly spread


class Range:
    """The range of one layer's inputs by `args.observer`, batch after batch."""

    def __init__(self, args: QuantArgs) -> None:
        self.args = args
        self._ends: tuple[Tensor, Tensor] | None = None
        self._samples: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take up the inputs of one batch `[tokens, width]`."""
        if not x.numel():  # an expert that no token was routed to
            return
        if self.args.observer in ("percentile", "mse"):
            self._samples.append(x[:: -(-x.numel() // SAMPLE)].float().flatten())
            return
        low, high = x.amin().float(), x.amax().float()
        if self._ends is not None and self.args.observer == "average":
            low, high = (MOMENTUM * e + (1 - MOMENTUM) * n for e, n in zip(self._ends, (low, high), strict=True))
        elif self._ends is not None:
            low, high = torch.minimum(self._ends[0], low), torch.maximum(self._ends[1], high)
        self._ends = low, high

    def ends(self) -> tuple[Tensor, Tensor] | None:
        """Both ends of the range, float32; None where no token was seen."""
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
            largest = _below(values.abs(), self.args.percentile)
            return -largest, largest
        return -_below(-values, self.args.percentile), _below(values, self.args.percentile)


def _below(values: Tensor, percentile: float) -> Tensor:
    """What `percentile` hundredths of the values are not above."""
    return values.kthvalue(max(1, round(len(values) * percentile / 100))).values

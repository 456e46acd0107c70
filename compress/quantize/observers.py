"""How the range of a layer's inputs is found when their scale is static: from what the layer reads on the calibration rows.

minmax      the smallest and the largest value
average     their moving average over the batches, momentum 0.95, the first batch as it is (ZeroQuant)
percentile  what all but `100 - percentile` hundredths of the values stay below, and above
mse         the range around zero that rounds a sample of the values with the least error, as of weights (grid.py)
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..activations import grid_of
from ..grid import fit_groups
from ..passes import Block
from ..scheme import QuantArgs
from ..tensor import CompressedTensor, InputGrid
from ..transform.recording import Batch, inputs_seen

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


def told_inputs(block: Block, batches: Iterable[Batch]) -> dict[str, CompressedTensor]:
    """The results of the block's quantized linears by their names inside it, told how their inputs are quantized; static
    grids are calibrated on what the linears read now. Experts that no token reached have the widest range of all."""
    quantized = {name: linear for name, linear in block.local().items() if linear.inputs is not None}
    ranges = {name: Range(x.inputs) for name, x in quantized.items() if x.inputs is not None and not x.inputs.dynamic}
    for batch in inputs_seen(block.module, batches, list(ranges)) if ranges else ():
        for name, x in batch.items():
            ranges[name].update(x)
    found = {name: ends for name, each in ranges.items() if (ends := each.ends()) is not None}
    widest = [torch.stack(each) for each in zip(*found.values(), strict=True)]
    told = {}
    for name, linear in quantized.items():
        if isinstance(linear.result, CompressedTensor) and linear.inputs is not None:
            grid = None
            if name in ranges:
                low, high = found.get(name, (widest[0].amin(), widest[1].amax()) if widest else (torch.zeros(()),) * 2)
                grid = _stored(low, high, linear.inputs)
            told[name] = replace(linear.result, inputs=linear.inputs, input_grid=grid)
    return told


def _stored(low: Tensor, high: Tensor, args: QuantArgs) -> InputGrid:
    scale, zero = grid_of(low, high, args, args.torch_scale_dtype)
    return scale.to(args.torch_scale_dtype).reshape(1), zero.reshape(1)


def _below(values: Tensor, percentile: float) -> Tensor:
    """What `percentile` hundredths of the values are not above."""
    return values.kthvalue(max(1, round(len(values) * percentile / 100))).values

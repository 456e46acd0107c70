"""Input grids: how the inputs of compressed layers are quantized, with static scales calibrated on what the layers read now."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..calibrate.observers import Range
from ..calibrate.recording import Batch, inputs_seen
from ..kernels.activations import grid_of
from ..kernels.tensor import Compressed, InputGrid
from ..recipes.scheme import QuantArgs, kinds
from .block import Block


def with_input_grids(block: Block, batches: Iterable[Batch]) -> dict[str, Compressed]:
    """The results of the linears whose inputs are quantized, with that quantization recorded, by their names inside the block.

    Static grids are calibrated on the inputs that the linears read now; an expert that no token reached gets the widest range.
    """
    quantized = {name: linear for name, linear in block.local().items() if linear.inputs is not None}
    ranges = {name: Range(x.inputs) for name, x in quantized.items() if x.inputs is not None and not x.inputs.dynamic}
    for batch in inputs_seen(block.module, batches, list(ranges)) if ranges else ():
        for name, x in batch.items():
            ranges[name].update(x)
    found = {name: ends for name, each in ranges.items() if (ends := each.ends()) is not None}
    widest = [torch.stack(each) for each in zip(*found.values(), strict=True)]
    results: dict[str, Compressed] = {}
    for name, linear in quantized.items():
        assert linear.result is not None and linear.inputs is not None
        grid = None
        if name in ranges:
            low, high = found.get(name, (widest[0].amin(), widest[1].amax()) if widest else (torch.zeros(()),) * 2)
            grid = _stored(low, high, linear.inputs)
        results[name] = kinds.kind_of_tensor(linear.result).with_inputs(linear.result, linear.inputs, grid)
    return results


def _stored(low: Tensor, high: Tensor, args: QuantArgs) -> InputGrid:
    scale, zero = grid_of(low, high, args, args.torch_scale_dtype)
    return scale.to(args.torch_scale_dtype).reshape(1), zero.reshape(1)

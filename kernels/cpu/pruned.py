"""Products with pruned weights by the compiled kernels, in the layout of the checkpoint."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import CompressError
from ..kernel import KernelSpec, PrunedProduct
from ..weight import PrunedWeight
from . import library

# The number of input rows from which `torch.mm` with slabs of dense rows is the faster product.
SLABS_FROM = {"avx512-vnni": 128, "avx2": 24, "neon-dotprod": 24, "portable": 2}
SLAB = 256


class CpuPruned(PrunedProduct):
    """A pruned weight as it is stored, and the index of the first value of each row (`starts` int64 `[rows + 1]`)."""

    def __init__(self, weight: PrunedWeight, spec: KernelSpec, instructions: str) -> None:
        super().__init__(weight)
        library.instruction_set(instructions)
        self.instructions = instructions
        self.starts: Tensor
        self.register_buffer("starts", weight.starts(), persistent=False)
        if int(self.starts[-1]) != weight.values.numel():
            raise CompressError(
                f"the mask marks {int(self.starts[-1])} weights, and {weight.values.numel()} are stored"
            )

    def forward(self, x: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
        call = torch.ops.lmpress.cpu_pruned_linear if traced else multiply
        return call(x, self.mask, self.values, self.starts, self.instructions)


def multiply(x: Tensor, mask: Tensor, values: Tensor, starts: Tensor, instructions: str) -> Tensor:
    """`x W^T` for `x` `[m, columns]` of any float dtype and strides: `[m, rows]`; see `PrunedWeight` for the weight."""
    chosen, inputs = library.instruction_set(instructions), x.to(torch.float32).contiguous()
    if x.shape[0] < SLABS_FROM[instructions]:
        return library.pruned_linear(inputs, (mask, values, starts), chosen).to(x.dtype)
    y = torch.empty(x.shape[0], mask.shape[0], dtype=torch.float32)
    for rows, slab in slabs((mask, values, starts), x.shape[1], chosen):
        torch.mm(inputs, slab.T, out=y[:, rows])
    return y.to(x.dtype)


def multiply_transposed(
    x: Tensor, mask: Tensor, values: Tensor, starts: Tensor, columns: int, instructions: str
) -> Tensor:
    """`x W` for `x` `[m, rows]`: `[m, columns]`."""
    inputs, y = x.to(torch.float32), torch.zeros(x.shape[0], columns, dtype=torch.float32)
    for rows, slab in slabs((mask, values, starts), columns, library.instruction_set(instructions)):
        y.addmm_(inputs[:, rows], slab)
    return y.to(x.dtype)


def slabs(weight: library.Pruned, columns: int, instructions: library.InstructionSet) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight as float32 `[rows, columns]`, up to SLAB at a time, in memory that the next slab overwrites."""
    count = weight[0].shape[0]
    slab = torch.empty(min(SLAB, count), columns, dtype=torch.float32)
    for first in range(0, count, SLAB):
        stop = min(first + SLAB, count)
        library.to_dense(weight, instructions, first, slab[: stop - first])
        yield slice(first, stop), slab[: stop - first]

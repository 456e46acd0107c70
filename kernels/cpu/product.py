"""Products by the compiled kernels: one per instruction set, all of one layout family."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernel import FLOAT_DTYPES, Kernel, Need, Product, Serves
from ..weight import Weight
from . import library
from .layout import Panels, pack, unpack
from .pruned import CpuPruned

# Best first; names are the C file's. The number of input rows from which exact products go through `torch.mm` on slabs of
# dequantized weight: where the machine's own multiplication is the better one for matrices.
SETS = {"avx512-vnni": None, "avx2": None, "neon-dotprod": None, "portable": 8}
SLAB = 256


class CpuProduct(Product):
    """A weight in panels (see `layout.py`)."""

    def __init__(self, weight: Weight, need: Need, instructions: str) -> None:
        super().__init__()
        lanes = library.instruction_set(instructions).lanes
        panels = pack(weight, lanes)
        self.instructions, self.activations, self.steps, self.lanes = instructions, need.activations, need.steps, lanes
        self.rows, self.columns, self.group = panels.rows, panels.columns, panels.group
        self.bits, self.center = panels.bits, panels.center
        self.panels: Tensor
        self.scales: Tensor
        self.offsets: Tensor | None
        self.table: Tensor | None
        self.register_buffer("panels", panels.codes, persistent=False)
        self.register_buffer("scales", panels.scales, persistent=False)
        self.register_buffer("offsets", panels.offsets, persistent=False)
        self.register_buffer("table", panels.table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
        call = torch.ops.lmpress.cpu_linear if traced else multiply
        return call(
            x,
            self.panels,
            self.scales,
            self.offsets,
            self.table,
            self.rows,
            self.columns,
            self.group,
            self.bits,
            self.center,
            self.instructions,
            self.activations,
            self.steps,
        )

    def codes(self) -> Tensor:
        return unpack(self.panels, self.lanes, self.rows, self.columns, self.group, self.bits)


def multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    table: Tensor | None,
    rows: int,
    columns: int,
    group: int,
    bits: int,
    center: int,
    instructions: str,
    activations: str,
    steps: float,
) -> Tensor:
    """`x W^T` for `x` `[m, columns]` of any float dtype and strides, the weight given as panels: `[m, rows]`."""
    panels = Panels(codes, scales, offsets, table, rows, columns, group, bits, center)
    chosen = library.instruction_set(instructions)
    inputs = x.to(torch.float32).contiguous()
    by_slabs = SETS[instructions]
    if activations == "float" and by_slabs is not None and x.shape[0] >= by_slabs:
        y = multiply_by_slabs(inputs, panels, chosen)
    else:
        y = library.linear(inputs, panels, chosen, activations, steps)
    return y.to(x.dtype)


def multiply_by_slabs(x: Tensor, panels: Panels, instructions: library.InstructionSet) -> Tensor:
    """The exact product by `torch.mm`, a slab of rows at a time."""
    y = torch.empty(x.shape[0], panels.rows, dtype=torch.float32)
    for rows, slab in slabs(panels, instructions):
        torch.mm(x, slab, out=y[:, rows])
    return y


def multiply_transposed(x: Tensor, panels: Panels, instructions: library.InstructionSet) -> Tensor:
    """`x W` for float32 `x` `[m, rows]`: `[m, columns]`."""
    y = torch.zeros(x.shape[0], panels.columns, dtype=torch.float32)
    for rows, slab in slabs(panels, instructions):
        y.addmm_(x[:, rows], slab.T)
    return y


def slabs(panels: Panels, instructions: library.InstructionSet) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight as floats `[columns, rows]`, up to SLAB at a time, in memory that is used again."""
    per_slab, count = SLAB // instructions.lanes, panels.codes.shape[0]
    slab = torch.empty(panels.columns, SLAB, dtype=torch.float32)
    for first in range(0, count, per_slab):
        library.dequantize(panels, instructions, first, min(per_slab, count - first), slab)
        start = first * instructions.lanes
        stop = min(start + SLAB, panels.rows)
        yield slice(start, stop), slab[:, : stop - start]


def kernel(instructions: str) -> Kernel:
    """The kernel of one instruction set."""
    return Kernel(
        name=f"c-{instructions}",
        serves=Serves(
            bits=frozenset(range(2, 9)),
            activations=frozenset({"float", "group", "token"}),
            devices=frozenset({"cpu"}),
            values=FLOAT_DTYPES,
        ),
        prepare=lambda weight, need: CpuProduct(weight, need, instructions),
        pruned=lambda weight, need: CpuPruned(weight, need, instructions),
    )


KERNELS = tuple(kernel(name) for name in SETS)

"""Products by the compiled kernels: one kernel per instruction set, all with weights in panels."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernel import FLOAT_DTYPES, Capabilities, Kernel, KernelSpec
from ..packed_layout import PackedLayout, flatten_layout
from ..weight import SparseRows, Weight
from . import library
from .layout import TABLE_BITS, Panels, pack, unpack
from .pruned import CpuPruned

# Best first; the names are those of native/instances.h. The number is the number of input rows from which exact products go
# through `torch.mm` with slabs of the dequantized weight, or None if the compiled kernel is always the faster one.
INSTRUCTION_SETS = {"avx512-vnni": None, "avx2": None, "neon-dotprod": None, "portable": 8}
SLAB = 256


class CpuProduct(PackedLayout[Panels]):
    """A weight in panels (see `layout.py`)."""

    def __init__(self, weight: Weight, spec: KernelSpec, instructions: str) -> None:
        lanes = library.instruction_set(instructions).lanes
        super().__init__(pack(weight, lanes))
        self.lanes, self.settings = lanes, (instructions, spec.activations, spec.steps)
        self._call: library.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return torch.ops.lmpress.cpu_linear(x, *flatten_layout(self.layout), *self.settings)
        return multiply(x, self.call)

    @property
    def call(self) -> library.Linear:
        """The product with the addresses of its tensors, prepared once."""
        if self._call is None:
            self._call = library.Linear(self.layout, *self.settings)
        return self._call

    def codes(self) -> Tensor:
        panels = self.layout
        return unpack(panels.packed, self.lanes, panels.rows, panels.columns, panels.group, panels.bits)

    def held_scale(self) -> Tensor | None:
        scales = self.layout.scales
        return None if scales is None else scales.transpose(1, 2).flatten(0, 1)[: self.layout.rows].contiguous()

    def __getstate__(self) -> dict[str, Any]:
        """The state without addresses, which are not valid in a copy."""
        return self.__dict__ | {"_call": None}


def multiply(x: Tensor, call: library.Linear) -> Tensor:
    """`x W^T` for `x` `[m, columns]` of any float dtype and strides: `[m, rows]`, in the dtype of `x`."""
    inputs = x.to(torch.float32).contiguous()
    slabs_from = INSTRUCTION_SETS[call.instructions.name]
    if call.activations == "float" and slabs_from is not None and x.shape[0] >= slabs_from:
        return multiply_by_slabs(inputs, call.panels, call.instructions).to(x.dtype)
    return call(inputs).to(x.dtype)


def multiply_by_slabs(x: Tensor, panels: Panels, instructions: library.InstructionSet) -> Tensor:
    """The exact product `x W^T` for float32 `x` `[m, columns]` by `torch.mm`: `[m, rows]`, a slab of rows at a time."""
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
    """Rows of the weight as float32 `[columns, rows]`, up to SLAB at a time, in memory that the next slab overwrites."""
    per_slab, count = SLAB // instructions.lanes, panels.packed.shape[0]
    slab = torch.empty(panels.columns, SLAB, dtype=torch.float32)
    for first in range(0, count, per_slab):
        library.dequantize(panels, instructions, first, min(per_slab, count - first), slab)
        start = first * instructions.lanes
        stop = min(start + SLAB, panels.rows)
        yield slice(start, stop), slab[:, : stop - start]


def added_sparse(residual: SparseRows, y: Tensor, x: Tensor) -> Tensor:
    """`y + x S^T` for float32 `y` `[m, rows]` and `x` `[m, columns]` of any float dtype; in place unless it is traced."""
    inputs, sparse = x.float().contiguous(), (residual.starts, residual.columns, residual.values)
    if torch.compiler.is_compiling() or y.requires_grad:
        return torch.ops.lmpress.cpu_add_sparse(y, inputs, *sparse)
    library.add_sparse(y, inputs, *sparse)
    return y


def kernel(instructions: str) -> Kernel:
    """The kernel of the instruction set called `instructions`."""
    return Kernel(
        name=f"c-{instructions}",
        serves=Capabilities(
            bits=frozenset(range(2, 9)),
            codebook_bits=frozenset({TABLE_BITS}),
            activations=frozenset({"float", "group", "token"}),
            devices=frozenset({"cpu"}),
            values=FLOAT_DTYPES,
        ),
        prepare=lambda weight, spec: CpuProduct(weight, spec, instructions),
        mixes=True,
        added=added_sparse,
        pruned=lambda weight, spec: CpuPruned(weight, spec, instructions),
    )


KERNELS = tuple(kernel(name) for name in INSTRUCTION_SETS)

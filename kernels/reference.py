"""The plain torch kernel: it supports every spec on every device, and every other kernel must agree with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel import FLOAT_DTYPES, Capabilities, CodedProduct, Kernel, KernelSpec, PrunedProduct
from .packing.bitstream import pack_rows, unpack_rows
from .weight import PrunedWeight, Weight

SLAB = 256  # rows of the weight that are dequantized at a time, so that no call holds a whole matrix


def quantized(x: Tensor, spec: KernelSpec) -> Tensor:
    """`x` `[m, in]` as it enters the product, in its dtype: rounded to int8 codes and back, or unchanged for float activations.

    A scale is `absmax / steps` over the row or over the group, computed in float32; codes are rounded half to even and
    clamped to -128 .. 127.
    """
    if spec.activations == "float":
        return x
    width = x.shape[1] if spec.activations == "token" else min(spec.group, x.shape[1])
    spans = F.pad(x.float(), (0, -x.shape[1] % width)).unflatten(1, (-1, width))
    scale = spans.abs().amax(-1, keepdim=True) / spec.steps
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((spans / scale).round_().clamp_(-128, 127) * scale).flatten(1)[:, : x.shape[1]].to(x.dtype)


class ReferenceProduct(CodedProduct):
    """Codes as a bit stream along each row, as in checkpoints; a slab of rows is dequantized at a time."""

    def __init__(self, weight: Weight, spec: KernelSpec) -> None:
        super().__init__()
        self.spec, self.columns = spec, weight.shape[1]
        self.packed: Tensor
        self.scale: Tensor
        self.zero: Tensor | None
        self.codebook: Tensor | None
        self.register_buffer("packed", pack_rows(weight.codes, weight.bits), persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("zero", weight.zero, persistent=False)
        self.register_buffer("codebook", weight.codebook, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        inputs, dtype = quantized(x, self.spec), torch.promote_types(x.dtype, torch.float32)
        slabs = [self._slab(start, dtype).to(x.dtype) for start in range(0, self.packed.shape[0], SLAB)]
        return torch.cat([F.linear(inputs, slab) for slab in slabs], dim=1)

    def codes(self) -> Tensor:
        return unpack_rows(self.packed, self.spec.bits, self.columns)

    def _slab(self, start: int, dtype: torch.dtype) -> Tensor:
        rows = slice(start, start + SLAB)
        codes = unpack_rows(self.packed[rows], self.spec.bits, self.columns)
        zero = None if self.zero is None else self.zero[rows]
        return Weight(codes, self.scale[rows], zero, self.spec.bits, self.spec.group, self.codebook).dequantize(dtype)


class ReferencePruned(PrunedProduct):
    """A pruned weight as it is stored; a slab of rows becomes dense at a time."""

    def __init__(self, weight: PrunedWeight, spec: KernelSpec) -> None:
        super().__init__(weight)
        self.starts = [0, *weight.starts()[SLAB::SLAB].tolist(), len(weight.values)]

    def forward(self, x: Tensor) -> Tensor:
        slabs = [self._slab(index).to(x.dtype) for index in range(-(-len(self.mask) // SLAB))]
        return torch.cat([F.linear(x, slab) for slab in slabs], dim=1)

    def _slab(self, index: int) -> Tensor:
        mask, values = self.mask[index * SLAB :][:SLAB], self.values[self.starts[index] : self.starts[index + 1]]
        return PrunedWeight(mask, values, self.width).dequantize(values.dtype)


REFERENCE = Kernel(
    name="torch-dequantize",
    serves=Capabilities(
        bits=frozenset(range(2, 9)),
        codebook_bits=frozenset(range(2, 9)),
        activations=frozenset({"float", "group", "token"}),
        dtypes=None,
        values=FLOAT_DTYPES,
    ),
    prepare=ReferenceProduct,
    pruned=ReferencePruned,
)

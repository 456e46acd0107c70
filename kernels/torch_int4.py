"""torch's own int4 product for CPUs, the fallback without a C compiler: bfloat16 inputs, fast for few rows.

Its layout depends on the machine's instruction set and cannot be converted back, so the codes are stored a second time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel import Capabilities, CodedProduct, Kernel, KernelSpec
from .reference import ReferenceProduct
from .weight import Weight

MOST_ROWS = 32  # of inputs; with more, dequantizing is faster than the scalar tail of this product
ROWS_PER_TILE = 16


class TorchInt4(CodedProduct):
    """`aten::_weight_int4pack_mm_for_cpu`: `w = (code - 8) * scale + shift`, scale and shift in bfloat16."""

    def __init__(self, weight: Weight, spec: KernelSpec) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.rows, self.group, self.padding = rows, spec.group, -columns % spec.group
        self.tiles: Tensor
        self.scales: Tensor
        self.reference = ReferenceProduct(weight, spec)
        missing = -rows % ROWS_PER_TILE
        codes = F.pad(weight.codes.int(), (0, self.padding, 0, missing))
        zero = torch.full_like(weight.scale, 8) if weight.zero is None else weight.zero.to(weight.scale.dtype)
        pairs = torch.stack([weight.scale, (8 - zero) * weight.scale], dim=-1)
        pairs = F.pad(pairs, (0, 0, 0, 0, 0, missing)).transpose(0, 1)
        self.register_buffer("tiles", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), persistent=False)
        self.register_buffer("scales", pairs.to(torch.bfloat16).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > MOST_ROWS:
            return self.reference(x)
        inputs = F.pad(x.to(torch.bfloat16), (0, self.padding)).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, self.tiles, self.group, self.scales)
        return y[:, : self.rows].to(x.dtype)

    def codes(self) -> Tensor:
        return self.reference.codes()


INT4 = Kernel(
    name="torch-int4-bf16",
    serves=Capabilities(
        bits=frozenset({4}),
        activations=frozenset({"group"}),
        devices=frozenset({"cpu"}),
        groups=frozenset({32, 64, 128, 256}),
    ),
    prepare=TorchInt4,
    tolerance=2e-2,
)

"""The module that takes a linear layer's place where inputs are quantized too (W8A8): integer codes meet integer codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compress.activations import encode, ranges, scale_of
from ..compress.formats.int_quantized import OFFSET
from ..compress.tensor import CompressedTensor


class IntegerLinear(nn.Module):
    """`y = scale_x * scale_w * (x_codes W_codes^T) + bias`, the plain torch form.

    weight       int8 `[out, in]`
    scale        `[out, 1]` in its stored dtype
    input_scale  `[1]` where the inputs' scale is static, else None: found at every call, per token or per tensor
    """

    def __init__(self, tensor: CompressedTensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        assert tensor.inputs is not None
        self.out_features, self.in_features = tensor.shape
        self.inputs = tensor.inputs
        self.codes: Tensor
        self.scale: Tensor
        self.input_scale: Tensor | None
        self.register_buffer("codes", (tensor.codes.to(torch.int16) - OFFSET).to(torch.int8), persistent=False)
        self.register_buffer("scale", tensor.scale, persistent=False)
        self.register_buffer("input_scale", tensor.input_scale, persistent=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        static = self.input_scale
        scale = scale_of(ranges(values, self.inputs), self.inputs) if static is None else static.float()
        # Products of 8-bit codes are exact in float32, sums up to 2**24: beyond 1000 columns their rounding is 1e-7.
        product = F.linear(encode(values, scale, self.inputs), self.codes.float())
        out = (product * scale * self.scale.float().T).to(x.dtype)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        kind = "dynamic" if self.inputs.dynamic else "static"
        return f"{self.in_features}, {self.out_features}, W8A8, {kind} inputs per {self.inputs.strategy}"

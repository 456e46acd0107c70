"""The modules that take a linear layer's place where inputs are quantized too: integer codes meet integer codes (W8A8), or
inputs are rounded before they meet weights of fewer bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compress.activations import encode, extremes, fake_quantize, grid_of
from ..compress.formats.int_quantized import OFFSET
from ..compress.scheme import QuantArgs
from ..compress.tensor import CompressedTensor


class QuantizedInputs(nn.Module):
    """What layers with inputs quantized by `inputs` share: the static grid, scale and zero `[1]`, where there is one."""

    def __init__(self, tensor: CompressedTensor) -> None:
        super().__init__()
        assert tensor.inputs is not None
        self.out_features, self.in_features = tensor.shape
        self.inputs: QuantArgs = tensor.inputs
        scale, zero = tensor.input_grid or (None, None)
        self.input_scale: Tensor | None
        self.input_zero: Tensor | None
        self.register_buffer("input_scale", scale, persistent=False)
        self.register_buffer("input_zero", zero, persistent=False)

    @property
    def static(self) -> tuple[Tensor, Tensor] | None:
        """The calibrated grid in float32; None where grids are found at every call."""
        if self.input_scale is None or self.input_zero is None:
            return None
        return self.input_scale.float(), self.input_zero.float()

    def extra_repr(self) -> str:
        kind = "dynamic" if self.inputs.dynamic else "static"
        return (
            f"{self.in_features}, {self.out_features}, {kind} int{self.inputs.bits} inputs per {self.inputs.strategy}"
        )


class IntegerLinear(QuantizedInputs):
    """`y = scale_x * scale_w * ((x_codes - zero_x) W_codes^T) + bias`, the plain torch form.

    codes  int8 `[out, in]`
    scale  `[out, 1]` in its stored dtype
    """

    def __init__(self, tensor: CompressedTensor, bias: nn.Parameter | None) -> None:
        super().__init__(tensor)
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", (tensor.codes.to(torch.int16) - OFFSET).to(torch.int8), persistent=False)
        self.register_buffer("scale", tensor.scale, persistent=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        grid = self.static or grid_of(*extremes(values, self.inputs), self.inputs)
        # Products of 8-bit codes are exact in float32, sums up to 2**24: beyond 1000 columns their rounding is 1e-7.
        product = F.linear(encode(values, grid, self.inputs), self.codes.float())
        out = (product * grid[0] * self.scale.float().T).to(x.dtype)
        return out if self.bias is None else out + self.bias


class RoundedInputs(QuantizedInputs):
    """`y = Q(x) W^T + bias`, where `packed` serves the weight."""

    def __init__(self, tensor: CompressedTensor, packed: nn.Module) -> None:
        super().__init__(tensor)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(fake_quantize(x, self.inputs, self.static))

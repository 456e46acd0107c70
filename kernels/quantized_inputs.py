"""The module that takes a linear layer's place where inputs are quantized too (W8A8): integer codes meet integer codes."""

from torch import Tensor

from ..compress.activations import encode, ranges, scale_of
from ..compress.scheme import QuantArgs
from ..compress.tensor import CompressedTensor, SpQRTensor
from .kernel import Activations
from .linear import PackedLinear


def activations_of(inputs: QuantArgs) -> Activations:
    """How inputs that are quantized by `inputs` enter the product."""
    return "token" if inputs.strategy == "token" else "float"


class IntegerLinear(PackedLinear):
    """`y = scale_x * scale_w * (x_codes W_codes^T) + bias`.

    Scales per token are found by the kernel, on its way through the inputs. One scale for all of them, static or found at
    every call, makes codes that an exact kernel takes as they are: products of 8-bit codes are exact in float32, and so are
    sums up to 2**24, beyond which their rounding is 1e-7.

    inputs       how inputs are quantized
    input_scale  `[1]` where their scale is static, else None
    """

    @property
    def compressed(self) -> CompressedTensor:
        """What the module serves."""
        return CompressedTensor(self.product.codes(), self.scale, self.zero, self.args, self.inputs, self.input_scale)

    @property
    def activations(self) -> Activations:
        """How inputs enter the product: that is the checkpoint's choice, not the server's."""
        return activations_of(self.inputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.activations == "token":
            return super().forward(x)
        values = x.reshape(-1, self.in_features).float()
        static = self.input_scale
        scale = scale_of(ranges(values, self.inputs), self.inputs) if static is None else static.float()
        y = (self.product(encode(values, scale, self.inputs)) * scale).to(x.dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        kind = "dynamic" if self.inputs.dynamic else "static"
        shape = f"{self.in_features}, {self.out_features}, W8A8, {kind} inputs per {self.inputs.strategy}"
        return f"{shape}, kernel={self.kernel}, activations={self.activations}"

    def _keep(self, tensor: CompressedTensor | SpQRTensor) -> None:
        super()._keep(tensor)
        assert isinstance(tensor, CompressedTensor) and tensor.inputs is not None
        self.inputs = tensor.inputs
        self.input_scale: Tensor | None
        self.register_buffer("input_scale", tensor.input_scale, persistent=False)

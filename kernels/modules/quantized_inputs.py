"""The module that replaces a linear layer if its inputs are quantized too: products of integer codes."""

from torch import Tensor

from ...recipes.scheme import QuantArgs
from ..activations import encode, extremes, grid_of
from ..kernel import STEPS, Activations
from ..tensor import CompressedTensor
from .linear import PackedLinear


def entering(inputs: QuantArgs) -> tuple[Activations, float]:
    """How inputs that are quantized by `inputs` enter the product, and the steps of a scale: `absmax / steps`.

    Kernels compute symmetric scales per token while they read the inputs; for any other grid the codes are made before.
    """
    if inputs.strategy == "token" and inputs.symmetric:
        return "token", 2.0 ** (inputs.bits - 1) - 1
    return "float", STEPS


class IntegerLinear(PackedLinear):
    """`y = scale_x * ((x_codes - zero_x) W^T) + bias`, W packed.

    Codes that are made before the product enter an exact kernel as they are: products of 8-bit codes are exact in float32,
    and so are sums up to 2**24, beyond which their rounding is 1e-7.

    inputs                   how inputs are quantized
    input_scale, input_zero  `[1]`: their grid if it is static, else None
    """

    @property
    def compressed(self) -> CompressedTensor:
        """What the module serves."""
        static = None if self.input_scale is None or self.input_zero is None else (self.input_scale, self.input_zero)
        scale = self._buffers["scale"]
        scale = self._held_scale if scale is None else scale
        return CompressedTensor(self.codes, scale, self._buffers["zero"], self.args, self.inputs, static)

    @property
    def activations(self) -> Activations:
        """How inputs enter the product: the checkpoint decides."""
        return entering(self.inputs)[0]

    @property
    def steps(self) -> float:
        """A scale of inputs is `absmax / steps`."""
        return entering(self.inputs)[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.activations == "token":
            return super().forward(x)
        values = x.reshape(-1, self.in_features).float()
        if self.input_scale is None or self.input_zero is None:
            grid = grid_of(*extremes(values, self.inputs), self.inputs)
        else:
            grid = self.input_scale.float(), self.input_zero.float()
        y = (self.product(encode(values, grid, self.inputs)) * grid[0]).to(x.dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        kind = "dynamic" if self.inputs.dynamic else "static"
        return f"{super().extra_repr()}, {kind} int{self.inputs.bits} inputs per {self.inputs.strategy}"

    def _keep(self, tensor: CompressedTensor) -> None:
        super()._keep(tensor)
        assert tensor.inputs is not None
        self.inputs = tensor.inputs
        scale, zero = tensor.input_grid or (None, None)
        self.input_scale: Tensor | None
        self.input_zero: Tensor | None
        self.register_buffer("input_scale", scale, persistent=False)
        self.register_buffer("input_zero", zero, persistent=False)

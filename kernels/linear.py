"""The module that takes a linear layer's place: its weight stays packed in memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..compress.formats.int_quantized import holds_int8
from ..compress.scheme import QuantArgs
from ..compress.tensor import Compressed, CompressedTensor
from . import apart, dispatch
from .kernel import Activations, Need, Product
from .quantized_inputs import IntegerLinear, RoundedInputs
from .stored import StoredLinear
from .weight import Weight


@dataclass(frozen=True)
class Serving:
    """How packed layers are to compute.

    `exact` False lets inputs become int8 codes, one scale per group: faster, and off by a few thousandths. `kernel` forces
    one by name. `dtype` is that of the inputs.
    """

    exact: bool = True
    kernel: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def activations(self) -> Activations:
        """How inputs enter the product."""
        return "float" if self.exact else "group"


class PackedLinear(nn.Module):
    """`y = x W^T + bias` with `W = scale * (codes - zero)` kept as codes.

    product  the weight in the layout of the kernel that serves it
    scale    `[out, groups]` in its stored dtype
    zero     uint8 `[out, groups]`, None for symmetric grids

    Raises `UsageError` where `serving` names a kernel that cannot serve.
    """

    def __init__(self, tensor: CompressedTensor, bias: nn.Parameter | None, serving: Serving | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.args: QuantArgs = tensor.args
        self.scale: Tensor
        self.zero: Tensor | None
        self.register_buffer("scale", tensor.scale, persistent=False)
        self.register_buffer("zero", tensor.zero, persistent=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self._arrange(tensor, serving or Serving())

    @property
    def compressed(self) -> CompressedTensor:
        """What the module serves."""
        return CompressedTensor(self.product.codes(), self.scale, self.zero, self.args)

    def serve(self, serving: Serving) -> None:
        """Choose a kernel anew and arrange the weight for it."""
        self._arrange(self.compressed, serving)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        args = self.args
        kind = "symmetric" if args.symmetric else "asymmetric"
        shape = f"{self.in_features}, {self.out_features}, int{args.bits} {kind}, group_size={args.group_size}"
        return f"{shape}, kernel={self.kernel}, activations={self.serving.activations}"

    def _arrange(self, tensor: CompressedTensor, serving: Serving) -> None:
        weight = Weight.of(tensor)
        need = Need.of(weight, serving.activations, serving.dtype)
        chosen = dispatch.choose(need, serving.kernel).kernel
        self.product: Product = apart.prepare(chosen, weight, need)
        self.serving, self.kernel = serving, chosen.name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves and casts choose the kernel anew for where they lead; what is stored keeps its dtype."""
        place = fn(torch.empty(0, dtype=self.serving.dtype, device=self.scale.device))
        stays = place.device == self.scale.device and place.dtype == self.serving.dtype
        scale, stored = self.scale, None if stays or place.is_meta else self.compressed
        super()._apply(fn, recurse=place.is_meta)  # nothing computes on meta, so its layout may stay
        self.scale = scale.to(place.device)
        if stored is not None:
            self._arrange(stored.to(place.device), replace(self.serving, dtype=place.dtype))
        return self


def serve(model: nn.Module, serving: Serving) -> None:
    """Choose the kernels of all packed layers of `model` anew."""
    for layer in _packed(model):
        layer.serve(serving)


def kernels_of(model: nn.Module) -> dict[str, int]:
    """How many packed layers of `model` each kernel serves, by name and activations: `{"c-avx2 float": 224}`."""
    return dict(Counter(f"{layer.kernel} {layer.serving.activations}" for layer in _packed(model)))


def replace_linear(
    model: nn.Module, name: str, tensor: Compressed, serving: Serving | None = None, device: torch.device | str = "cpu"
) -> None:
    """Put a module that serves `tensor` on `device` at the dotted `name`, keeping the bias parameter that stands there."""
    parent, _, leaf = name.rpartition(".")
    bias = getattr(model.get_submodule(name), "bias", None)
    if not isinstance(tensor, CompressedTensor):
        module = StoredLinear(tensor, bias)
    elif tensor.inputs is not None and holds_int8(tensor.args):
        module = IntegerLinear(tensor, bias).to(device)
    else:
        module = PackedLinear(tensor.to(device), bias, serving)
        if tensor.inputs is not None:
            module = RoundedInputs(tensor.to(device), module)
    setattr(model.get_submodule(parent), leaf, module)


def _packed(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]

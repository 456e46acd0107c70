"""The module that takes a linear layer's place: its weight stays packed in memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..compress.scheme import QuantArgs
from ..compress.tensor import CompressedTensor
from . import apart, dispatch
from .kernel import Activations, Need, Product
from .reference import REFERENCE
from .weight import Weight


class PackedLinear(nn.Module):
    """`y = x W^T + bias` with `W = scale * (codes - zero)` kept as codes.

    product  the weight in the layout of the kernel that serves it: plain torch until `serve` chooses
    scale    `[out, groups]` in its stored dtype
    zero     uint8 `[out, groups]`, None for symmetric grids
    """

    def __init__(self, tensor: CompressedTensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.args: QuantArgs = tensor.args
        self.scale: Tensor
        self.zero: Tensor | None
        self.register_buffer("scale", tensor.scale, persistent=False)
        self.register_buffer("zero", tensor.zero, persistent=False)
        self.register_parameter("bias", bias)
        self.activations: Activations = "float"
        self.asked: str | None = REFERENCE.name
        self.dtype = torch.float32
        self._arrange(tensor)

    @property
    def compressed(self) -> CompressedTensor:
        """What the module serves."""
        return CompressedTensor(self.product.codes(), self.scale, self.zero, self.args)

    def serve(self, *, exact: bool = True, kernel: str | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Choose a kernel for inputs of `dtype` and arrange the weight for it.

        `exact` False lets inputs become int8 codes, one scale per group: faster, and off by a few thousandths. `kernel`
        forces one by name; raises `UsageError` where that one cannot serve.
        """
        self.activations, self.asked, self.dtype = "float" if exact else "group", kernel, dtype
        self._arrange(self.compressed)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        args = self.args
        kind = "symmetric" if args.symmetric else "asymmetric"
        shape = f"{self.in_features}, {self.out_features}, int{args.bits} {kind}, group_size={args.group_size}"
        return f"{shape}, kernel={self.kernel}, activations={self.activations}"

    def _arrange(self, tensor: CompressedTensor) -> None:
        weight = Weight.of(tensor)
        need = Need.of(weight, self.activations, self.dtype)
        chosen = dispatch.choose(need, self.asked).kernel
        self.kernel = chosen.name
        self.product: Product = apart.prepare(chosen, weight, need)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves follow the model to another device, where the kernel is chosen anew; casts leave what is stored as it is."""
        place = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device))
        stays = place.device == self.scale.device and place.dtype == self.dtype
        stored = None if stays else self.compressed
        scale = self.scale
        super()._apply(fn, recurse=False)
        self.scale, self.dtype = scale.to(place.device), place.dtype
        if stored is not None:
            self._arrange(CompressedTensor(stored.codes.to(place.device), self.scale, self.zero, self.args))
        return self


def serve(
    model: nn.Module, *, exact: bool = True, kernel: str | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """`PackedLinear.serve` for every packed layer of `model`."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.serve(exact=exact, kernel=kernel, dtype=dtype)


def serving(model: nn.Module) -> dict[str, int]:
    """How many packed layers of `model` each kernel serves: `{"c-avx2 float": 224}`."""
    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            name = f"{module.kernel} {module.activations}"
            counts[name] = counts.get(name, 0) + 1
    return counts


def replace_linear(model: nn.Module, name: str, tensor: CompressedTensor) -> None:
    """Put a `PackedLinear` of `tensor` at the dotted `name`, keeping the bias parameter that stands there."""
    parent, _, leaf = name.rpartition(".")
    bias = getattr(model.get_submodule(name), "bias", None)
    setattr(model.get_submodule(parent), leaf, PackedLinear(tensor, bias))

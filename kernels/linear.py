"""The module that takes a linear layer's place: its weight stays packed in memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.formats.int_quantized import holds_int8
from ..compress.scheme import QuantArgs
from ..compress.tensor import (
    Compressed,
    CompressedTensor,
    LowRankTensor,
    MixedTensor,
    NF4Tensor,
    PrunedTensor,
    Served,
    SpQRTensor,
    parts,
    settings,
)
from . import apart, dispatch
from .kernel import Activations, Need, Product
from .low_rank import LowRankLinear
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
    """`y = x W^T + bias` with `W` kept as codes.

    product  the weight in the layout of the kernel that serves it

    What the codes stand for are buffers in their stored dtypes, called as the fields of the tensor: `scale` and `zero` of a
    grid, `absmax` of NF4. Raises `UsageError` where `serving` names a kernel that cannot serve.
    """

    def __init__(self, tensor: Served, bias: nn.Parameter | None, serving: Serving | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.args: QuantArgs = tensor.args
        self._kind: type[Served] = type(tensor)
        self._settings = settings(tensor)
        self._stored = [name for name in parts(tensor) if name != "codes"]
        for name, part in parts(tensor).items():
            if name != "codes":
                self.register_buffer(name, part, persistent=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self._arrange(tensor, serving or Serving())

    @property
    def compressed(self) -> Served:
        """What the module serves."""
        stored: dict[str, Any] = {name: self._buffers[name] for name in self._stored}
        return self._kind(codes=self.product.codes(), **stored, **self._settings)

    def serve(self, serving: Serving) -> None:
        """Choose a kernel anew and arrange the weight for it."""
        self._arrange(self.compressed, serving)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        args = self.args
        kind = "symmetric" if args.symmetric else "asymmetric"
        grid = f"int{args.bits} {kind}" if args.kind == "grid" else args.kind
        shape = f"{self.in_features}, {self.out_features}, {grid}, group_size={args.group_size}"
        return f"{shape}, kernel={self.kernel}, activations={self.activations}"

    def _arrange(self, tensor: Served, serving: Serving) -> None:
        weight = Weight.of(tensor)
        self.activations: Activations = "token" if isinstance(tensor, MixedTensor) else serving.activations
        need = Need.of(weight, self.activations, serving.dtype)
        chosen = dispatch.choose(need, serving.kernel).kernel
        self.product: Product = apart.prepare(chosen, weight, need)
        self.serving, self.kernel = serving, chosen.name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves and casts choose the kernel anew for where they lead; what is stored keeps its dtype."""
        stored = {name: part for name in self._stored if (part := self._buffers[name]) is not None}
        device = next(iter(stored.values())).device
        place = fn(torch.empty(0, dtype=self.serving.dtype, device=device))
        stays = place.device == device and place.dtype == self.serving.dtype
        tensor = None if stays or place.is_meta else self.compressed
        super()._apply(fn, recurse=place.is_meta)  # nothing computes on meta, so its layout may stay
        self._buffers.update({name: part.to(place.device) for name, part in stored.items()})
        if tensor is not None:
            self._arrange(tensor.to(place.device), replace(self.serving, dtype=place.dtype))
        return self


def serve(model: nn.Module, serving: Serving) -> None:
    """Choose the kernels of all packed layers of `model` anew."""
    for layer in _packed(model):
        layer.serve(serving)


def kernels_of(model: nn.Module) -> dict[str, int]:
    """How many packed layers of `model` each kernel serves, by name and activations: `{"c-avx2 float": 224}`."""
    return dict(Counter(f"{layer.kernel} {layer.activations}" for layer in _packed(model)))


def replace_linear(
    model: nn.Module, name: str, tensor: Compressed, serving: Serving | None = None, device: torch.device | str = "cpu"
) -> None:
    """Put a module that serves `tensor` on `device` at the dotted `name`, keeping the bias parameter that stands there."""
    parent, _, leaf = name.rpartition(".")
    bias = getattr(model.get_submodule(name), "bias", None)
    setattr(model.get_submodule(parent), leaf, _module(tensor, bias, serving, device))


def _module(
    tensor: Compressed, bias: nn.Parameter | None, serving: Serving | None, device: torch.device | str
) -> nn.Module:
    if isinstance(tensor, LowRankTensor):
        return LowRankLinear(_module(tensor.base, bias, serving, device), tensor).to(device)
    if isinstance(tensor, CompressedTensor) and tensor.inputs is not None:
        if holds_int8(tensor.args):
            return IntegerLinear(tensor, bias).to(device)
        weight = replace(tensor, inputs=None, input_grid=None).to(device)
        return RoundedInputs(tensor.to(device), PackedLinear(weight, bias, serving))
    if isinstance(tensor, PrunedTensor | SpQRTensor) or (isinstance(tensor, NF4Tensor) and not tensor.rows_are_blocks):
        return StoredLinear(tensor, bias)
    return PackedLinear(tensor.to(device), bias, serving)


def _packed(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]

"""The modules that replace linear layers: their weights stay packed in memory, and a kernel multiplies by them."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...recipes.scheme import QuantArgs, kinds
from .. import dispatch
from ..kernel import STEPS, Activations, CodedProduct, KernelSpec, Product, PrunedProduct
from ..outliers import WithResidual, prepare
from ..tensor import Compressed, PrunedTensor, Quantized, SpQRTensor, parts, settings
from ..weight import Levels, PrunedWeight, Weight


@dataclass(frozen=True)
class Serving:
    """How packed layers are to compute.

    `exact` False rounds inputs to int8 codes, one scale per group: faster, with an error of a few thousandths. `kernel` forces
    one by name. `dtype` is that of the inputs.
    """

    exact: bool = True
    kernel: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def activations(self) -> Activations:
        """How inputs enter the product."""
        return "float" if self.exact else "group"


class ServedLinear(nn.Module, ABC):
    """`y = x W^T + bias` by a kernel of the dispatch.

    product    the weight in the layout of the kernel that serves it
    is_packed  whether `serve` chooses its kernel, and `kernels_of` counts it

    Raises `UsageError` if `serving` names a kernel that cannot serve.
    """

    is_packed = True

    def __init__(self, tensor: Compressed, bias: nn.Parameter | None, serving: Serving | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self._keep(tensor)
        self._arrange(tensor, serving or Serving())

    @property
    @abstractmethod
    def compressed(self) -> Compressed:
        """What the module serves."""

    @property
    def activations(self) -> Activations:
        """How inputs enter the product."""
        return self.serving.activations

    @property
    def steps(self) -> float:
        """A scale of int8 inputs is `absmax / steps`."""
        return STEPS

    def serve(self, serving: Serving) -> None:
        """Choose a kernel again and arrange the weight for it."""
        self._arrange(self.compressed, serving)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kernel={self.kernel}, activations={self.activations}"

    @abstractmethod
    def _keep(self, tensor: Any) -> None:
        """Register what `compressed` needs besides the product: buffers that no cast changes."""

    def _arrange(self, tensor: Compressed, serving: Serving) -> None:
        self.serving = serving
        weight = self._weight(tensor)
        need = KernelSpec.of(weight, self.activations, serving.dtype, self.steps)
        chosen = dispatch.choose(need, serving.kernel).kernel
        self.product: Product = prepare(chosen, weight, need)
        self.kernel = chosen.name
        self._release(tensor, weight)

    def _release(self, tensor: Any, weight: Any) -> None:
        """Drop what the product holds too."""

    @abstractmethod
    def _weight(self, tensor: Any) -> Weight | PrunedWeight:
        """What the kernels are given."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ServedLinear":
        """Moves and casts choose the kernel again for the new device and dtype; what is stored keeps its dtype."""
        kept = dict(self.named_buffers(recurse=False))
        before = next(self.product.buffers()).device
        place = fn(torch.empty(0, dtype=self.serving.dtype, device=before))
        stays = place.device == before and place.dtype == self.serving.dtype
        stored = None if stays or place.is_meta else self.compressed
        super()._apply(fn, recurse=place.is_meta)  # nothing computes on meta, so its layout may stay
        for name, part in kept.items():
            self._buffers[name] = part.to(place.device)
        if stored is not None:
            self._arrange(stored.to(place.device), replace(self.serving, dtype=place.dtype))
        return self


class PackedLinear(ServedLinear):
    """`y = x W^T + bias` with `W` kept as codes.

    What the codes stand for are buffers in their stored dtypes, called as the fields of the tensor: `scale` and `zero` of a
    grid, `absmax` of NF4. A `scale` that the product holds is None here.
    """

    def __init__(self, tensor: Quantized, bias: nn.Parameter | None, serving: Serving | None = None) -> None:
        self.args: QuantArgs = tensor.args
        super().__init__(tensor, bias, serving)

    @property
    def compressed(self) -> Quantized:
        """What the module serves."""
        stored: dict[str, Any] = {name: self._buffers[name] for name in self._stored}
        if "scale" in stored and stored["scale"] is None:
            stored["scale"] = self._held_scale
        return self._kind(codes=self.codes, **stored, **self._settings)

    @property
    def codes(self) -> Tensor:
        """The codes of the weight, uint8 `[out, in]`."""
        return self._coded.codes()

    @property
    def _held_scale(self) -> Tensor:
        """The scale that the product holds, as it is stored."""
        held = self._coded.held_scale()
        assert held is not None
        return held.to(self._scale_dtype)

    @property
    def _coded(self) -> CodedProduct:
        assert isinstance(self.product, CodedProduct)
        return self.product

    def extra_repr(self) -> str:
        label = kinds.kind_of(self.args).label(self.args)
        shape = f"{self.in_features}, {self.out_features}, {label}, group_size={self.args.group_size}"
        return f"{shape}, kernel={self.kernel}, activations={self.activations}"

    def _keep(self, tensor: Any) -> None:
        self._kind: type[Any] = type(tensor)
        self._settings = settings(tensor)
        self._stored = [name for name in parts(tensor) if name != "codes"]
        for name in self._stored:
            self.register_buffer(name, parts(tensor)[name], persistent=False)

    def _release(self, tensor: Any, weight: Weight) -> None:
        if "scale" in self._stored and weight.scale is tensor.scale:
            self._scale_dtype = tensor.scale.dtype
            self._buffers["scale"] = tensor.scale if self._coded.held_scale() is None else None

    def _weight(self, tensor: Any) -> Weight:
        return Weight.of(tensor)


class OutlierColumnsLinear(PackedLinear):
    """A `PackedLinear` whose inputs are quantized per token, except for columns in 16 bits (LLM.int8)."""

    @property
    def activations(self) -> Activations:
        """How inputs enter the product: the checkpoint decides."""
        return "token"


class PrunedLinear(ServedLinear):
    """`y = x W^T + bias` with only the weights that are not pruned in memory, and a mask of one bit per weight."""

    @property
    def compressed(self) -> PrunedTensor:
        """What the module serves."""
        assert isinstance(self.product, PrunedProduct)
        weight = self.product.weight
        return PrunedTensor(weight.dequantize(weight.values.dtype), weight.kept(), self.args)

    @property
    def activations(self) -> Activations:
        """Pruned weights are not codes, and their inputs are not quantized."""
        return "float"

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.args}, kernel={self.kernel}"

    def _keep(self, tensor: PrunedTensor) -> None:
        self.args = tensor.args

    def _weight(self, tensor: PrunedTensor) -> PrunedWeight:
        return PrunedWeight.of(tensor)


class SpQRLinear(PackedLinear):
    """`y = x (W + S)^T + bias` with W kept as codes of bilevel scales and real zeros, and S sparse.

    levels, grids  the scales and zeros (see `Levels`), which compiled kernels read as they are
    """

    @property
    def compressed(self) -> SpQRTensor:
        """What the module serves."""
        rows = self.product
        assert isinstance(rows, WithResidual)
        residual = (rows.starts.diff(), rows.indices.long(), rows.values)
        levels = Levels(self.get_buffer("levels"), self.get_buffer("grids"))
        return SpQRTensor(self.codes, *levels.two(self.out_features), *residual, self.args)

    def _keep(self, tensor: SpQRTensor) -> None:
        levels = Levels.of(tensor.scale, tensor.zero)
        self.register_buffer("levels", levels.codes, persistent=False)
        self.register_buffer("grids", levels.grids, persistent=False)

    def _release(self, tensor: SpQRTensor, weight: Weight) -> None:
        """The product does not hold the scales, so nothing is dropped."""

    def _weight(self, tensor: SpQRTensor) -> Weight:
        """With the levels that are held here."""
        return replace(super()._weight(tensor), levels=Levels(self.get_buffer("levels"), self.get_buffer("grids")))


def serve(model: nn.Module, serving: Serving) -> None:
    """Choose the kernels of all packed layers of `model` again."""
    for layer in _packed(model):
        layer.serve(serving)


def kernels_of(model: nn.Module) -> dict[str, int]:
    """How many packed layers of `model` each kernel serves, by name and activations: `{"c-avx2 float": 224}`."""
    return dict(Counter(f"{layer.kernel} {layer.activations}" for layer in _packed(model)))


def _packed(model: nn.Module) -> list[ServedLinear]:
    return [module for module in model.modules() if isinstance(module, ServedLinear) and module.is_packed]

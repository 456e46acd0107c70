"""The module that takes a linear layer's place: its weight stays packed in memory."""

from torch import Tensor, nn

from ..compress.formats import sparse
from ..compress.formats.bitstream import pack_rows, unpack_rows
from ..compress.scheme import PruneArgs, QuantArgs
from ..compress.tensor import CompressedTensor, PrunedTensor
from .quantized_inputs import IntegerLinear
from .reference import packed_linear


class PackedLinear(nn.Module):
    """`y = x W^T + bias` with `W = scale * (codes - zero)` kept as codes.

    packed  int32 `[out, ceil(in * bits / 32)]`, a bit stream along each row (the checkpoint's layout)
    scale   `[out, groups]` in its stored dtype
    zero    uint8 `[out, groups]`, None for symmetric grids
    """

    def __init__(self, tensor: CompressedTensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.args: QuantArgs = tensor.args
        self.packed: Tensor
        self.scale: Tensor
        self.zero: Tensor | None
        self.register_buffer("packed", pack_rows(tensor.codes, tensor.args.bits), persistent=False)
        self.register_buffer("scale", tensor.scale, persistent=False)
        self.register_buffer("zero", tensor.zero, persistent=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def compressed(self) -> CompressedTensor:
        """What the module serves."""
        codes = unpack_rows(self.packed, self.args.bits, self.in_features)
        return CompressedTensor(codes, self.scale, self.zero, self.args)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed, self.scale, self.zero, self.args, self.bias)

    def extra_repr(self) -> str:
        args = self.args
        kind = "symmetric" if args.symmetric else "asymmetric"
        return f"{self.in_features}, {self.out_features}, int{args.bits} {kind}, group_size={args.group_size}"

    def _apply(self, fn, recurse: bool = True) -> "PackedLinear":  # noqa: ANN001
        """Moves follow the model to another device; casts (`model.half()`) leave the stored scales as they are."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self


class SparseLinear(nn.Module):
    """`y = x W^T + bias` with a pruned `W`, kept in memory as it is on disk and unfolded for every product.

    Buffers are the tensors of `formats/sparse.py` by their last names, without the shape.
    """

    def __init__(self, tensor: PrunedTensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.args: PruneArgs = tensor.args
        for name, part in sparse.pack("", tensor).items():
            self.register_buffer(name.removeprefix("."), part, persistent=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def compressed(self) -> PrunedTensor:
        """What the module serves."""
        return sparse.unpack("", {f".{name}": part for name, part in self.named_buffers()}, self.args)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.compressed.dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.args.storage}"


def replace_linear(model: nn.Module, name: str, tensor: CompressedTensor | PrunedTensor) -> None:
    """Put a module that serves `tensor` at the dotted `name`, keeping the bias parameter that stands there."""
    parent, _, leaf = name.rpartition(".")
    bias = getattr(model.get_submodule(name), "bias", None)
    setattr(model.get_submodule(parent), leaf, _serving(tensor, bias))


def _serving(tensor: CompressedTensor | PrunedTensor, bias: nn.Parameter | None) -> nn.Module:
    if isinstance(tensor, PrunedTensor):
        return SparseLinear(tensor, bias)
    return PackedLinear(tensor, bias) if tensor.inputs is None else IntegerLinear(tensor, bias)

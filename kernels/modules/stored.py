"""The module of weights that no kernel multiplies as they are stored: NF4 with blocks that cross row ends."""

from collections.abc import Callable

from torch import Tensor, nn

from ..packing.bitstream import pack_rows, unpack_rows
from ..tensor import NF4Tensor, parts, settings


class StoredLinear(nn.Module):
    """`y = x W^T + bias` with `W` kept packed in memory and dequantized for every product.

    The buffers are the parts of the compressed tensor, its codes as one bit stream.
    """

    def __init__(self, tensor: NF4Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.args = tensor.args
        self._kind, self._settings = type(tensor), settings(tensor)
        for name, part in parts(tensor).items():
            packed = pack_rows(part.view(1, -1), self.args.bits) if name == "codes" and part is not None else part
            self.register_buffer(name, packed, persistent=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def compressed(self) -> NF4Tensor:
        """What the module serves."""
        stored = dict(self._buffers)
        codes = stored.pop("codes")
        assert codes is not None
        codes = unpack_rows(codes, self.args.bits, self.out_features * self.in_features)
        return self._kind(codes=codes.view(self.out_features, -1), **stored, **self._settings)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.compressed.dequantize().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.args}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredLinear":
        """Moves follow the model to another device; casts (`model.half()`) leave what is stored as it is."""
        stored = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, part in stored.items():
            if self._buffers[name].dtype != part.dtype:  # type: ignore[union-attr]
                self._buffers[name] = part.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self

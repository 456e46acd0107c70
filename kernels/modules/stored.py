"""The module of weights that no kernel multiplies as they are stored: NF4 with blocks over row ends."""

from collections.abc import Callable

from torch import Tensor, nn

from ...compress.formats.storage import format_of
from ...compress.tensor import Compressed, NF4Tensor

DOT = "/"  # in the names of buffers, which hold no dots


class StoredLinear(nn.Module):
    """`y = x W^T + bias` with `W` kept in memory as it is on disk and unfolded for every product.

    Buffers are the tensors of the weight's format by their last names, with `/` for a dot.
    """

    def __init__(self, tensor: NF4Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.args = tensor.args
        for name, part in format_of(tensor.args).pack("", tensor).items():
            self.register_buffer(name.removeprefix(".").replace(".", DOT), part, persistent=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def compressed(self) -> Compressed:
        """What the module serves."""
        tensors = {f".{name.replace(DOT, '.')}": part for name, part in self.named_buffers()}
        return format_of(self.args).unpack("", tensors, self.args)

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

"""Which format holds the layers of a recipe, and what every format offers."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ..scheme import QuantArgs, WeightArgs
from ..tensor import CompressedTensor, PrunedTensor
from . import layer
from .int_quantized import IntQuantized
from .shards import TensorSpec


class Format(Protocol):
    """Stateless: what it can hold, what that takes on disk, there and back, and how config.json says so."""

    def supports(self, args: WeightArgs) -> str | None: ...

    def spec(self, name: str, args: WeightArgs, rows: int, columns: int) -> dict[str, TensorSpec]: ...

    def pack(self, name: str, tensor: CompressedTensor | PrunedTensor) -> dict[str, Tensor]: ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor], args: WeightArgs) -> CompressedTensor | PrunedTensor: ...

    def quantization_config(
        self, compressed: Mapping[str, WeightArgs], ignored: Iterable[str]
    ) -> dict[str, Any] | None: ...


def format_for(inputs: QuantArgs | None) -> Format:
    """The format of layers whose inputs are quantized by `inputs`, or left as they are."""
    return layer if inputs is None else IntQuantized(inputs)

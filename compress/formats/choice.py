"""Which format holds the layers of a scheme."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..scheme import QuantArgs
from ..tensor import CompressedTensor
from . import pack_quantized
from .int_quantized import IntQuantized
from .shards import TensorSpec


class Format(Protocol):
    """What every format offers: see `pack_quantized`, which is a module of these functions."""

    @property
    def NAME(self) -> str: ...  # noqa: N802  a constant of the module

    def supports(self, args: QuantArgs) -> str | None: ...

    def spec(self, name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]: ...

    def pack(self, name: str, tensor: CompressedTensor) -> dict[str, Tensor]: ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> CompressedTensor: ...

    def quantization_config(self, quantized: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]: ...

    def read_config(
        self, config: Mapping[str, Any], layers: Iterable[str], scale_dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, QuantArgs]: ...


def format_for(inputs: QuantArgs | None) -> Format:
    """The format of layers whose inputs are quantized by `inputs`, or left as they are."""
    return pack_quantized if inputs is None else IntQuantized(inputs)

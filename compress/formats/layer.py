"""Which format holds a layer: integer codes are packed as compressed-tensors does, pruned weights in our sparse layout.

A format is a module with `supports`, `spec`, `pack`, `unpack` and `quantization_config`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..scheme import PruneArgs, WeightArgs
from ..tensor import CompressedTensor, PrunedTensor
from . import pack_quantized, sparse
from .shards import TensorSpec


def supports(args: WeightArgs) -> str | None:
    """Why no format can hold a weight compressed by `args`, or None where one can."""
    return sparse.supports(args) if isinstance(args, PruneArgs) else pack_quantized.supports(args)


def spec(name: str, args: WeightArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` will give for a `rows` x `columns` weight."""
    if isinstance(args, PruneArgs):
        return sparse.spec(name, args, rows, columns)
    return pack_quantized.spec(name, args, rows, columns)


def pack(name: str, tensor: CompressedTensor | PrunedTensor) -> dict[str, Tensor]:
    """The tensors of one compressed weight."""
    return sparse.pack(name, tensor) if isinstance(tensor, PrunedTensor) else pack_quantized.pack(name, tensor)


def unpack(name: str, tensors: Mapping[str, Tensor], args: WeightArgs) -> CompressedTensor | PrunedTensor:
    """The inverse of `pack`."""
    if isinstance(args, PruneArgs):
        return sparse.unpack(name, tensors, args)
    return pack_quantized.unpack(name, tensors, args)


def quantization_config(compressed: Mapping[str, WeightArgs], ignored: Iterable[str]) -> dict[str, Any] | None:
    """The `quantization_config` of config.json; None for a checkpoint that any loader reads as it is."""
    pruned = {name: args for name, args in compressed.items() if isinstance(args, PruneArgs)}
    quantized = {name: args for name, args in compressed.items() if not isinstance(args, PruneArgs)}
    return (
        sparse.quantization_config(pruned, ignored)
        if pruned
        else pack_quantized.quantization_config(quantized, ignored)
    )

"""Which format holds a layer: integer codes as compressed-tensors packs them, two-level ones and pruned weights in our own.

A format is a module with `supports`, `spec`, `pack`, `unpack` and `quantization_config`.
"""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from ..scheme import PruneArgs, WeightArgs
from ..tensor import CompressedTensor, PrunedTensor, SpQRTensor
from . import pack_quantized, sparse, spqr
from .shards import TensorSpec

Compressed = CompressedTensor | PrunedTensor | SpQRTensor


def format_of(args: WeightArgs) -> ModuleType:
    """The format of weights compressed by `args`."""
    if isinstance(args, PruneArgs):
        return sparse
    return spqr if args.scale_dtype == "bilevel" else pack_quantized


def supports(args: WeightArgs) -> str | None:
    """Why no format can hold a weight compressed by `args`, or None where one can."""
    return format_of(args).supports(args)


def spec(name: str, args: WeightArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` will give for a `rows` x `columns` weight."""
    return format_of(args).spec(name, args, rows, columns)


def pack(name: str, tensor: Compressed) -> dict[str, Tensor]:
    """The tensors of one compressed weight."""
    return format_of(tensor.args).pack(name, tensor)


def unpack(name: str, tensors: Mapping[str, Tensor], args: WeightArgs) -> Compressed:
    """The inverse of `pack`."""
    return format_of(args).unpack(name, tensors, args)


def quantization_config(compressed: Mapping[str, WeightArgs], ignored: Iterable[str]) -> dict[str, Any] | None:
    """The `quantization_config` of config.json; None for a checkpoint that any loader reads as it is."""
    used = {format_of(args) for args in compressed.values()}
    assert len(used) == 1  # the last pass leaves one kind of weight behind
    return used.pop().quantization_config(compressed, ignored)

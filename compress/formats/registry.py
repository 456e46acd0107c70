"""Formats and readers: what stores a weight, and what reads a checkpoint. Both are looked up in the record of the kind."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...calibrate.model.safetensors_io import TensorSpec
from ...kernels.tensor import Compressed
from ...recipes.scheme import QuantArgs, WeightArgs, kinds

Specs = Mapping[str, TensorSpec]


class Format(Protocol):
    """How weights of some kind lie on disk: a module, a `Layout`, or an object that holds how inputs are quantized."""

    def supports(self, args: Any, /) -> str | None:
        """Why the format cannot hold a weight compressed by `args`, or None if it can."""
        ...

    def spec(self, name: str, args: Any, rows: int, columns: int, /) -> dict[str, TensorSpec]:
        """The tensors that `pack` will give for a `rows` x `columns` weight."""
        ...

    def pack(self, name: str, tensor: Any, /) -> dict[str, Tensor]:
        """The tensors of one compressed weight."""
        ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor], args: Any, /) -> Compressed:
        """The inverse of `pack`."""
        ...

    def quantization_config(self, compressed: Mapping[str, Any], ignored: Iterable[str], /) -> dict[str, Any] | None:
        """The `quantization_config` of config.json; None for an ordinary dense checkpoint."""
        ...


@dataclass(frozen=True)
class Layout:
    """A format whose functions need nothing but their arguments."""

    NAME: str
    supports: Callable[[Any], str | None]
    spec: Callable[[str, Any, int, int], dict[str, TensorSpec]]
    pack: Callable[[str, Any], dict[str, Tensor]]
    unpack: Callable[[str, Mapping[str, Tensor], Any], Compressed]
    quantization_config: Callable[[Mapping[str, Any], Iterable[str]], dict[str, Any] | None]


@dataclass(frozen=True)
class Reader:
    """How one checkpoint is read; `optional` tensors of a layer may be absent. `inputs` is how layers' inputs are quantized.

    arguments  of every layer that a `quantization_config` and the specs of the stored tensors describe
    specs      of a layer's tensors, from its name, arguments, rows and columns
    listed     (args, input columns) -> what lists of layers call them; None: as their kind has it
    """

    arguments: Callable[[Mapping[str, Any], Specs], Mapping[str, WeightArgs]]
    specs: Callable[[str, Any, int, int], dict[str, TensorSpec]]
    unpack: Callable[[str, Mapping[str, Tensor], Any], Compressed]
    optional: tuple[str, ...] = ()
    inputs: QuantArgs | None = None
    listed: Callable[[Any, int], str] | None = None


def format_of(args: WeightArgs, inputs: QuantArgs | None = None) -> Format:
    """The format of weights compressed by `args`, of layers whose inputs are quantized by `inputs` or left as they are."""
    return kinds.kind_of(args).format(args, inputs)


def reader_of(config: Mapping[str, Any], stored: Specs) -> Reader:
    """The reader of a checkpoint with this `quantization_config` and these tensors.

    Raises `ValueError` for a checkpoint that lmpress does not read.
    """
    readers = (kind.read(config, stored) for kind in kinds.all_kinds())
    found = next((reader for reader in readers if reader is not None), None)
    if found is None:
        raise ValueError(f"quantization method {config.get('quant_method')!r}, format {config.get('format')!r}")
    return found

"""Which format stores a weight. A format is a module with `supports`, `spec`, `pack`, `unpack` and `quantization_config`."""

from types import ModuleType

from ..scheme import QuantArgs
from . import pack_quantized, spqr


def format_of(args: QuantArgs) -> ModuleType:
    """The format of weights quantized by `args`."""
    return spqr if args.scale_dtype == "bilevel" else pack_quantized

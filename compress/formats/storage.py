"""Which format stores a weight.

A format is a module with `supports`, `spec`, `pack`, `unpack`, and for config.json `quantization_config`, `wrote` (is this
config its own?) and `read_config` (the arguments of every layer that it stores).
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..scheme import PruneArgs, WeightArgs
from . import pack_quantized, sparse, spqr


def format_of(args: WeightArgs) -> ModuleType:
    """The format of weights compressed by `args`."""
    if isinstance(args, PruneArgs):
        return sparse
    return spqr if args.scale_dtype == "bilevel" else pack_quantized


def format_that_wrote(config: Mapping[str, Any]) -> ModuleType:
    """The format that a checkpoint's `quantization_config` speaks of. Raises `ValueError` for what lmpress does not read."""
    found = next((each for each in (sparse, spqr, pack_quantized) if each.wrote(config)), None)
    if found is None:
        raise ValueError(f"quantization method {config.get('quant_method')!r}, format {config.get('format')!r}")
    return found

"""Which format stores a weight.

A format is a module with `supports`, `spec`, `pack`, `unpack`, and for config.json `quantization_config`, `wrote` (is this
config its own?) and `read_config` (the arguments of every layer that it stores). Where inputs are quantized too, an object
that knows how they are offers the first five.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..scheme import Kind, PruneArgs, QuantArgs, WeightArgs
from . import int_quantized, llm_int8, pack_quantized, sparse, spqr
from .export import bitsandbytes
from .int_quantized import IntQuantized
from .llm_int8 import LLMInt8

Format = ModuleType | IntQuantized | LLMInt8
OF_KIND: dict[Kind, Format] = {"grid": pack_quantized, "two-level": spqr, "nf4": bitsandbytes}


def format_of(args: WeightArgs, inputs: QuantArgs | None = None) -> Format:
    """The format of weights compressed by `args`, of layers whose inputs are quantized by `inputs` or left as they are."""
    if isinstance(args, PruneArgs):
        return sparse
    if inputs is not None:
        return LLMInt8(inputs) if args.kind == "columns" else IntQuantized(inputs)
    return OF_KIND[args.kind]


def format_that_wrote(config: Mapping[str, Any]) -> ModuleType:
    """The format that a checkpoint's `quantization_config` speaks of. Raises `ValueError` for what lmpress does not read."""
    found = next(
        (each for each in (bitsandbytes, sparse, spqr, llm_int8, int_quantized, pack_quantized) if each.wrote(config)),
        None,
    )
    if found is None:
        raise ValueError(f"quantization method {config.get('quant_method')!r}, format {config.get('format')!r}")
    return found

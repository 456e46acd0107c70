"""Which format stores a weight.

A format is a module with `supports`, `spec`, `pack`, `unpack`, and for config.json `quantization_config`, `wrote` (is this
config its own?) and `read_config` (the arguments of every layer that it stores). Where inputs are quantized too, an object
that knows how they are offers the first five.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import Tensor

from ...calibrate.model.safetensors_io import TensorSpec
from ...kernels.tensor import Compressed, LowRankTensor
from ...recipes.scheme import Kind, PruneArgs, QuantArgs, WeightArgs
from . import int_quantized, llm_int8, pack_quantized, sparse, spqr
from .export import bitsandbytes
from .gguf import stored as gguf
from .int_quantized import IntQuantized
from .llm_int8 import LLMInt8

LOW_RANK = "low-rank"


@dataclass(frozen=True)
class WithLowRank:
    """Any format with the low-rank term of each layer beside it.

    P.weight_left   float16 [out, rank]
    P.weight_right  float16 [rank, in]: the weight is what the other tensors say, plus left times right
    """

    base: "Format"

    def supports(self, args: WeightArgs) -> str | None:
        """Why the format cannot hold a weight compressed by `args`, or None where it can."""
        return self.base.supports(_without_rank(args))

    def spec(self, name: str, args: WeightArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The tensors that `pack` will give for a `rows` x `columns` weight."""
        return self.base.spec(name, _without_rank(args), rows, columns) | low_rank_spec(name, args, rows, columns)

    def pack(self, name: str, tensor: Compressed) -> dict[str, Tensor]:
        """The tensors of one weight."""
        assert isinstance(tensor, LowRankTensor)
        term = {f"{name}.weight_left": tensor.left, f"{name}.weight_right": tensor.right}
        return self.base.pack(name, tensor.base) | term

    def unpack(self, name: str, tensors: Mapping[str, Tensor], args: WeightArgs) -> LowRankTensor:
        """The inverse of `pack`."""
        base: Any = self.base.unpack(name, tensors, _without_rank(args))
        return LowRankTensor(base, tensors[f"{name}.weight_left"], tensors[f"{name}.weight_right"])

    def quantization_config(self, compressed: Mapping[str, WeightArgs], ignored: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json: the base's inside it.

        Under the name of compressed-tensors with groups in a list, so that transformers refuses it (see `sparse.py`).
        """
        ignore, plain = sorted(ignored), {name: _without_rank(args) for name, args in compressed.items()}
        groups = [{"targets": [n], "rank": args.rank} for n, args in compressed.items() if isinstance(args, QuantArgs)]
        base = self.base.quantization_config(plain, ignore)
        config = {"quant_method": "compressed-tensors", "format": LOW_RANK, "ignore": ignore}
        return config | {"config_groups": groups, "base": base}


Format = ModuleType | IntQuantized | LLMInt8 | WithLowRank


def low_rank_spec(name: str, args: WeightArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors of a low-rank term alone."""
    assert isinstance(args, QuantArgs)
    left, right = TensorSpec("F16", (rows, args.rank)), TensorSpec("F16", (args.rank, columns))
    return {f"{name}.weight_left": left, f"{name}.weight_right": right}


def _without_rank(args: WeightArgs) -> QuantArgs:
    assert isinstance(args, QuantArgs)
    return replace(args, rank=0)


OF_KIND: dict[Kind, Format] = {"grid": pack_quantized, "two-level": spqr, "nf4": bitsandbytes, "blocks": gguf}


def format_of(args: WeightArgs, inputs: QuantArgs | None = None) -> Format:
    """The format of weights compressed by `args`, of layers whose inputs are quantized by `inputs` or left as they are."""
    if isinstance(args, PruneArgs):
        return sparse
    if args.kind == "low-rank":
        return WithLowRank(format_of(replace(args, rank=0), inputs))
    if inputs is not None:
        return LLMInt8(inputs) if args.kind == "columns" else IntQuantized(inputs)
    return OF_KIND[args.kind]


def format_that_wrote(config: Mapping[str, Any]) -> ModuleType:
    """The format that a checkpoint's `quantization_config` speaks of. Raises `ValueError` for what lmpress does not read."""
    found = next(
        (
            each
            for each in (bitsandbytes, sparse, spqr, gguf, llm_int8, int_quantized, pack_quantized)
            if each.wrote(config)
        ),
        None,
    )
    if found is None:
        raise ValueError(f"quantization method {config.get('quant_method')!r}, format {config.get('format')!r}")
    return found

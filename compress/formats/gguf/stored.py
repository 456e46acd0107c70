"""Weights stored in GGUF's blocks: those solved on their grids, and those of GGUF files that others made.

P.weight_blocks  uint8 [out, bytes of a row]  the blocks of one row after another, as in a GGUF file (`blocks.py`)
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ....calibrate.model.safetensors_io import TensorSpec
from ....kernels.tensor import BlockTensor, CompressedTensor
from ....recipes.scheme import QuantArgs
from . import blocks

NAME = "gguf-blocks"


def supports(args: QuantArgs) -> str | None:
    """Why the format cannot hold a weight quantized by `args`, or None where it can."""
    return None if args.kind == "blocks" else f"{NAME} stores the 'ggml' grid only"


def spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` will give for a `rows` x `columns` weight."""
    nbytes = blocks.bytes_per_row(blocks.kind(args, columns), columns)
    return {f"{name}.weight_blocks": TensorSpec("U8", (rows, nbytes))}


def pack(name: str, tensor: BlockTensor | CompressedTensor) -> dict[str, Tensor]:
    """The tensors of one quantized weight."""
    return {f"{name}.weight_blocks": blocks.pack(name, tensor)}


def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> BlockTensor | CompressedTensor:
    """The inverse of `pack`."""
    return blocks.unpack(blocks.kind(args, blocks.BLOCK), tensors[f"{name}.weight_blocks"])


def quantization_config(quantized: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: the block of every layer."""
    return config_of({name: args.block for name, args in quantized.items() if args.block}, ignored)


def config_of(layers: Mapping[str, str], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of layers and their blocks.

    Under the name of compressed-tensors with groups in a list, so that transformers refuses it (see `sparse.py`).
    """
    names = {block: [name for name, own in layers.items() if own == block] for block in dict.fromkeys(layers.values())}
    groups = [{"targets": targets, "block": block} for block, targets in names.items()]
    return {"quant_method": "compressed-tensors", "format": NAME, "ignore": sorted(ignored), "config_groups": groups}


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` speaks of this layout."""
    return config.get("format") == NAME


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `quantization_config` of a checkpoint. Raises `ValueError` for unknown blocks."""
    unknown = next((g["block"] for g in config["config_groups"] if g["block"] not in blocks.BLOCKS), None)
    if unknown is not None:
        raise ValueError(f"blocks {unknown}")
    return {name: blocks.arguments(group["block"]) for group in config["config_groups"] for name in group["targets"]}

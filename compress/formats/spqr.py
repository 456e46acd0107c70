"""SpQR's own format: 16-row tiles of codes with their two-level grid, and the residual of the outliers as compressed rows.

P.weight_tiles    uint8 [ceil(out / 16), groups, bytes]  one tile after another; a tile is, in this order, its codes
                  (16 x group, row after row, a little-endian bit stream), 16 scale codes and 16 zero codes of 3 bits each,
                  and four float16: scale and zero of the scale codes, scale and zero of the zero codes
P.weight_counts   [out]      residuals of each row        uint8, uint16 or int32, the narrowest that holds `in`
P.weight_columns  [entries]  their columns                the same
P.weight_values   float16 [entries]
P.weight_shape    int64 [2]  (out, in)

The residual is what the dense part lacks, not the weight: real-valued zeros put no code exactly on 0, so a format that adds
the full weight to the dense part serves something else than was evaluated.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...calibrate.model.safetensors_io import NAMES, TensorSpec
from ...kernels.packing.bitstream import pack_rows, unpack_rows
from ...kernels.tensor import LEVEL, TILE, Bilevel, SpQRTensor
from ...recipes.scheme import QuantArgs

NAME = "spqr"
LEVEL_BYTES = TILE * LEVEL.bits // 8
FLOATS = 4  # second-level numbers of a tile


def supports(args: QuantArgs) -> str | None:
    """Why the format cannot hold a weight quantized by `args`, or None where it can."""
    return None if args.scale_dtype == "bilevel" else f"{NAME} stores two-level scales only"


def entries(args: QuantArgs, rows: int, columns: int) -> int:
    """How many weights of a layer keep a residual."""
    return round(args.outliers * rows * columns)


def spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` will give for a `rows` x `columns` weight."""
    size = args.columns_per_scale(columns)
    record = TILE * size * args.bits // 8 + 2 * LEVEL_BYTES + 2 * FLOATS
    index, count = NAMES[index_dtype(columns)], entries(args, rows, columns)
    return {
        f"{name}.weight_tiles": TensorSpec("U8", (math.ceil(rows / TILE), math.ceil(columns / size), record)),
        f"{name}.weight_counts": TensorSpec(index, (rows,)),
        f"{name}.weight_columns": TensorSpec(index, (count,)),
        f"{name}.weight_values": TensorSpec("F16", (count,)),
        f"{name}.weight_shape": TensorSpec("I64", (2,)),
    }


def index_dtype(columns: int) -> torch.dtype:
    """The narrowest dtype for column numbers and for counts of up to `columns`."""
    return next(dtype for dtype in (torch.uint8, torch.uint16, torch.int32) if columns <= torch.iinfo(dtype).max)


def pack(name: str, tensor: SpQRTensor) -> dict[str, Tensor]:
    """The tensors of one quantized weight."""
    rows, columns = tensor.shape
    size = tensor.args.columns_per_scale(columns)
    tiles, groups = math.ceil(rows / TILE), math.ceil(columns / size)
    codes = _padded(tensor.codes, tiles * TILE, groups * size).view(tiles, TILE, groups, size).transpose(1, 2)
    levels = [
        _padded(t.codes, tiles * TILE, groups).view(tiles, TILE, groups).transpose(1, 2)
        for t in (tensor.scale, tensor.zero)
    ]
    floats = torch.stack([tensor.scale.scale, tensor.scale.zero, tensor.zero.scale, tensor.zero.zero], -1)
    record = [_bytes(codes, tensor.args.bits), *(_bytes(level, LEVEL.bits) for level in levels)]
    index = index_dtype(columns)
    return {
        f"{name}.weight_tiles": torch.cat([*record, floats.contiguous().view(torch.uint8)], -1),
        f"{name}.weight_counts": tensor.counts.to(index),
        f"{name}.weight_columns": tensor.columns.to(index),
        f"{name}.weight_values": tensor.values,
        f"{name}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }


def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> SpQRTensor:
    """The inverse of `pack`."""
    rows, columns = (int(n) for n in tensors[f"{name}.weight_shape"])
    size = args.columns_per_scale(columns)
    parts = tensors[f"{name}.weight_tiles"].split(
        [TILE * size * args.bits // 8, LEVEL_BYTES, LEVEL_BYTES, 2 * FLOATS], -1
    )
    codes = _numbers(parts[0], args.bits, TILE * size).unflatten(-1, (TILE, size)).transpose(1, 2)
    levels = [_numbers(p, LEVEL.bits, TILE).transpose(1, 2).flatten(0, 1)[:rows].contiguous() for p in parts[1:3]]
    floats = parts[3].contiguous().view(torch.float16).unbind(-1)
    return SpQRTensor(
        codes=codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(),
        scale=Bilevel(levels[0], floats[0].contiguous(), floats[1].contiguous()),
        zero=Bilevel(levels[1], floats[2].contiguous(), floats[3].contiguous()),
        counts=tensors[f"{name}.weight_counts"].to(torch.int64),
        columns=tensors[f"{name}.weight_columns"].to(torch.int64),
        values=tensors[f"{name}.weight_values"],
        args=args,
    )


def quantization_config(quantized: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: the arguments of every layer.

    Under the name of compressed-tensors with groups in a list, so that transformers refuses it (see `sparse.py`).
    """
    groups = [
        {"targets": [name], "bits": args.bits, "group_size": args.group_size, "outliers": args.outliers}
        for name, args in quantized.items()
    ]
    return {"quant_method": "compressed-tensors", "format": NAME, "ignore": sorted(ignored), "config_groups": groups}


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` speaks of this layout."""
    return config.get("format") == NAME


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `quantization_config` of a checkpoint."""
    found = {}
    for group in config["config_groups"]:
        own = {name: group[name] for name in ("bits", "group_size", "outliers")}
        args = QuantArgs(symmetric=False, formula="spqr", scale_dtype="bilevel", **own)
        found |= dict.fromkeys(group["targets"], args)
    return found


def _padded(codes: Tensor, rows: int, columns: int) -> Tensor:
    padded = codes.new_zeros(rows, columns)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    return padded


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """`codes` `[tiles, groups, ...]` as bit streams: uint8 `[tiles, groups, bytes]`."""
    flat = codes.flatten(2)
    packed = pack_rows(flat.flatten(0, 1), bits).view(torch.uint8)
    return packed[:, : flat.shape[-1] * bits // 8].unflatten(0, flat.shape[:2])


def _numbers(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_bytes`: uint8 `[tiles, groups, count]`."""
    flat = stream.flatten(0, 1)
    words = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 4)).contiguous().view(torch.int32)
    return unpack_rows(words, bits, count).unflatten(0, stream.shape[:2])

"""SpQR's bilevel weights, in a format of our own: 16-row tiles of codes with their grid, and the residual of the outliers.

P.weight_tiles    uint8 [ceil(out / 16), groups, bytes]  one tile after another; a tile is, in this order, its codes
                  (16 x group, row after row, a little-endian bit stream), 16 scale codes and 16 zero codes of 3 bits each,
                  and four float16: scale and zero of the scale codes, scale and zero of the zero codes
P.weight_counts   [out]      residuals of each row        uint8, uint16 or int32, the narrowest that holds `in`
P.weight_columns  [entries]  their columns                the same
P.weight_values   float16 [entries]
P.weight_shape    int64 [2]  (out, in)

The residual is the error of the dense part, not the weight: real-valued zeros put no code exactly on 0, so a format that adds
the full weight to the dense part serves something else than was evaluated.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ....calibrate.model.safetensors_io import NAMES, TensorSpec
from ....errors import CompressError, UsageError
from ....kernels.kernel import KernelSpec
from ....kernels.modules.linear import Serving, SpQRLinear
from ....kernels.packing.bitstream import pack_rows, unpack_rows
from ....kernels.tensor import LEVEL, TILE, Bilevel, SpQRTensor
from ....kernels.tensor.grid import Grid
from ....kernels.weight import Levels, SparseRows, Weight
from ....recipes.scheme import QuantArgs
from ....recipes.scheme.kinds import Kind, Written
from ..int_quantized import of_inputs
from ..registry import Layout, Reader, Specs

NAME = "spqr"
LEVEL_BYTES = TILE * LEVEL.bits // 8
FLOATS = 4  # second-level numbers of a tile
LOADING = """\
SpQR has a format of its own here: no other runtime serves it.
"""


def supports(args: QuantArgs) -> str | None:
    """Why the format cannot hold a weight quantized by `args`, or None if it can."""
    return None if args.scale_dtype == "bilevel" else f"{NAME} stores bilevel scales only"


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


def check_indices(name: str, indices: Tensor, columns: int) -> None:
    """Raise `CompressError` if one of the column numbers `indices` (an integer dtype) is not below `columns`."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < columns:
        raise CompressError(
            f"{name} holds numbers of columns that are not below {columns}", "the checkpoint is damaged"
        )


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
    """The inverse of `pack`. Raises `CompressError` if the residuals are not of this matrix."""
    rows, columns = (int(n) for n in tensors[f"{name}.weight_shape"])
    size = args.columns_per_scale(columns)
    parts = tensors[f"{name}.weight_tiles"].split(
        [TILE * size * args.bits // 8, LEVEL_BYTES, LEVEL_BYTES, 2 * FLOATS], -1
    )
    codes = _numbers(parts[0], args.bits, TILE * size).unflatten(-1, (TILE, size)).transpose(1, 2)
    levels = [_numbers(p, LEVEL.bits, TILE).transpose(1, 2).flatten(0, 1)[:rows].contiguous() for p in parts[1:3]]
    floats = parts[3].contiguous().view(torch.float16).unbind(-1)
    counts, places = (tensors[f"{name}.weight_{part}"].to(torch.int64) for part in ("counts", "columns"))
    check_indices(f"{name}.weight_columns", places, columns)
    if counts.sum() != len(places) or (counts < 0).any():
        raise CompressError(f"{name}.weight_counts does not fit {len(places)} residuals", "the checkpoint is damaged")
    return SpQRTensor(
        codes=codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(),
        scale=Bilevel(levels[0], floats[0].contiguous(), floats[1].contiguous()),
        zero=Bilevel(levels[1], floats[2].contiguous(), floats[3].contiguous()),
        counts=counts,
        columns=places,
        values=tensors[f"{name}.weight_values"],
        args=args,
    )


def quantization_config(quantized: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: the arguments of every layer.

    Under the name of compressed-tensors with groups in a list, so that transformers refuses it (see `pruned.py`).
    """
    groups = [
        {"targets": [name], "bits": args.bits, "group_size": args.group_size, "outliers": args.outliers}
        for name, args in quantized.items()
    ]
    return {"quant_method": "compressed-tensors", "format": NAME, "ignore": sorted(ignored), "config_groups": groups}


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of this format."""
    return config.get("format") == NAME


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `quantization_config` of a checkpoint."""
    found = {}
    for group in config["config_groups"]:
        own = {name: group[name] for name in ("bits", "group_size", "outliers")}
        args = QuantArgs(symmetric=False, formula="spqr", scale_dtype="bilevel", **own)
        found |= dict.fromkeys(group["targets"], args)
    return found


def read(config: Mapping[str, Any], stored: Specs) -> Reader | None:
    """The reader of a checkpoint in this format."""
    return Reader(read_config, spec, unpack) if wrote(config) else None


def check(args: QuantArgs) -> None:
    """Raise `UsageError` for bilevel scales of another grid than SpQR's."""
    if args.formula != "spqr" or args.strategy != "group":
        raise UsageError("bilevel scales need the 'spqr' grid and groups", "use --method spqr --group-size 32")


def round_to_nearest(weight: Tensor, args: QuantArgs) -> SpQRTensor:
    """The nearest codes of `weight` `[out, in]` on bilevel scales and zeros, without outliers.

    The last group may be shorter.
    """
    size, args = args.columns_per_scale(weight.shape[1]), replace(args, outliers=0.0)
    plain = replace(args, scale_dtype="float32", strategy="channel", group_size=None)
    groups = weight.float().split(size, 1)
    fitted = [Grid.fit(group, plain) for group in groups]
    scale = Bilevel.fit(torch.cat([grid.scale for grid in fitted], 1))
    zero = Bilevel.fit(torch.cat([grid.zero for grid in fitted], 1))
    served = zip(groups, scale.values(torch.float32).split(1, 1), zero.values(torch.float32).split(1, 1), strict=True)
    codes = torch.cat([Grid(s, z, plain).quantize(group) for group, s, z in served], 1)
    none = torch.zeros(0, dtype=torch.int64, device=weight.device)
    return SpQRTensor(codes, scale, zero, none.new_zeros(len(weight)), none, none.half(), args)


def operand(tensor: SpQRTensor) -> Weight:
    """With the bilevel scales, which kernels may hold in place of scales and zeros, and the residual."""
    grid, starts = tensor.grid(), tensor.counts.new_zeros(len(tensor.counts) + 1)
    starts[1:] = tensor.counts.cumsum(0)
    residual = SparseRows(starts, tensor.columns.to(torch.int32), tensor.values)
    group = tensor.args.columns_per_scale(tensor.shape[1])
    levels = Levels.of(tensor.scale, tensor.zero)
    return Weight(tensor.codes, grid.scale, grid.zero, tensor.args.bits, group, residual=residual, levels=levels)


def kernel_spec(args: QuantArgs, width: int) -> KernelSpec:
    """What layers need of a kernel."""
    return KernelSpec(args.bits, args.columns_per_scale(width), args.symmetric, parts=("levels", "residual"))


def module(tensor: SpQRTensor, bias: nn.Parameter | None, serving: Serving | None) -> nn.Module:
    """A layer that keeps the bilevel scales as they are stored."""
    return SpQRLinear(tensor, bias, serving)


def label(args: QuantArgs) -> str:
    """`int3 asymmetric`"""
    return f"int{args.bits} asymmetric"


def listed(args: QuantArgs, width: int) -> str:
    """The name of the layout."""
    return "SpQR tiles"


def stored_as(written: Written) -> str:
    """A format of our own."""
    return "SpQR tiles of lmpress"


def loading(written: Written) -> str:
    """No other runtime loads it."""
    return LOADING


def for_width(args: QuantArgs, width: int) -> QuantArgs:
    """Groups of nearly the size asked for: tiles may be padded, so that the last group may be shorter."""
    assert args.group_size is not None
    if width % args.group_size == 0:
        return args
    return replace(args, group_size=math.ceil(width / max(1, round(width / args.group_size))))


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


FORMAT = Layout(NAME, supports, spec, pack, unpack, quantization_config)
KIND = Kind(
    tensor=SpQRTensor,
    round=round_to_nearest,
    format=lambda args, inputs: of_inputs(FORMAT, inputs),
    read=read,
    operand=operand,
    spec=kernel_spec,
    module=module,
    label=label,
    listed=listed,
    tags="quantized, spqr",
    stored_as=stored_as,
    loading=loading,
    taxonomy="bilevel scales",
    example=lambda: QuantArgs(8, False, formula="spqr", scale_dtype="bilevel"),
    method="spqr",
    check=check,
    for_width=for_width,
)

"""The kernels as calls on tensors. Importing this module imports Triton, but needs no GPU."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernel import Activations
from . import configs
from .configs import Config, capability_of, config, processors_of, splits, variants
from .device.dequantize import dequantize
from .device.gemv import gemv
from .device.linear import add_up, linear
from .device.quantize import quantize
from .device.sparse import add_sparse
from .device.weight import Format, WeightArgs
from .layout import Tiles
from .tuned import Regime, tuned_on

SLAB = 1024  # rows of the weight that are dequantized at a time
DEQUANTIZE_ROWS = 32
ADD_UP_BLOCK = 1024
QUANTIZE_BLOCK = 1024
SPARSE_BLOCK = 32


def multiply(x: Tensor, tiles: Tiles, activations: Activations, steps: float) -> Tensor:
    """`x W^T` for `x` `[m, columns]`: `[m, rows]`, in the dtype of `x`."""
    x = x.contiguous()
    if activations != "float":
        return _multiply_int8(x, tiles, activations, steps)
    if x.shape[0] > configs.MOST_ROWS:
        return _multiply_by_slabs(x, tiles)
    inputs = _pad_groups(x, tiles) if tiles.padded else x
    if x.shape[0] == 1:
        return _multiply_row(inputs, tiles)
    return _multiply_tiles(inputs, None, tiles, "float", x.dtype)


def multiply_transposed(grad: Tensor, tiles: Tiles) -> Tensor:
    """`grad W` for `grad` `[m, rows]`: `[m, columns]`, exact."""
    out = torch.zeros(grad.shape[0], tiles.columns, dtype=torch.float32, device=grad.device)
    for rows, slab in slabs(tiles, grad.dtype):
        out += grad[:, rows] @ slab
    return out.to(grad.dtype)


def slabs(tiles: Tiles, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in `dtype` `[rows, columns]`, up to SLAB at a time, in memory that the next slab overwrites."""
    memory = torch.empty(min(SLAB, tiles.rows), tiles.columns, dtype=dtype, device=tiles.low.device)
    for start in range(0, tiles.rows, SLAB):
        count = min(SLAB, tiles.rows - start)
        grid = (_ceil_div(count, DEQUANTIZE_ROWS), tiles.slabs)
        _run(
            dequantize, grid, memory, _weight(tiles), start, count, tiles.columns, tiles.group,
            FORMAT=_format(tiles, per_row=False), BLOCK_N=DEQUANTIZE_ROWS,
        )  # fmt: skip
        yield slice(start, start + count), memory[:count]


def quantized(x: Tensor, tiles: Tiles, activations: Activations, steps: float) -> tuple[Tensor, Tensor]:
    """int8 codes of `x` at the column positions of `tiles`, and their scales float32 `[m, spans]`."""
    m, columns = x.shape
    group_width = tiles.group_parts * tiles.width
    padded = tiles.scales.shape[0] * group_width
    span, padded_span = (tiles.group, group_width) if activations == "group" else (columns, padded)
    spans = _ceil_div(columns, span)
    if activations == "token" and tiles.padded:
        x, span, columns = _pad_groups(x, tiles), padded, padded
    codes = torch.empty(m, padded, dtype=torch.int8, device=x.device)
    scales = torch.empty(m, spans, dtype=torch.float32, device=x.device)
    block = min(QUANTIZE_BLOCK, _power_of_two(padded_span))
    if m:
        numbers = (columns, span, padded_span, spans, padded, steps)
        _run(quantize, (m, spans), x, codes, scales, *numbers, BLOCK=block)
    return codes, scales


def added_sparse(y: Tensor, x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`y + x S^T` for S in compressed rows; `y` float32 `[m, rows]`, `x` `[m, width]`: float32 `[m, rows]`."""
    (m, n), x = y.shape, x.contiguous()
    total = torch.empty_like(y, memory_format=torch.contiguous_format)
    block = min(16, _power_of_two(max(1, m)))
    if m:
        tensors, grid = (y.contiguous(), x, starts, columns, values, total), (n, _ceil_div(m, block))
        _run(add_sparse, grid, *tensors, m, n, x.shape[1], BLOCK_M=block, BLOCK_E=SPARSE_BLOCK)
    return total


def choices(x: Tensor, tiles: Tiles, activations: Activations) -> list[Config]:
    """The tiles that a search tries for inputs like `x`, first the usual one."""
    return variants(_usual(x, tiles, activations))


def _chosen(x: Tensor, tiles: Tiles, activations: Activations, dtype: torch.dtype) -> Config:
    """The tile that a search found fastest on this GPU, or the usual one."""
    regime = Regime.of(x.shape[0], tiles, activations, dtype)
    return tuned_on(x).get(regime) or _usual(x, tiles, activations)


def _usual(x: Tensor, tiles: Tiles, activations: Activations) -> Config:
    if x.shape[0] == 1 and activations == "float":
        return configs.GEMV
    return config(x.shape[0], activations, tiles.bits, tiles.codebook is not None, capability_of(x))


def _run(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start `kernel` on a grid of programs, on the device of its first argument: Triton uses the current device, which may be
    another GPU. The types of Triton's own call cannot be checked."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, **constants)


def _multiply_int8(x: Tensor, tiles: Tiles, activations: Activations, steps: float) -> Tensor:
    if tiles.scales.shape[0] == 1:
        activations = "token"
    codes, scales = quantized(x, tiles, activations, steps)
    return _multiply_tiles(codes, scales, tiles, activations, x.dtype)


def _multiply_tiles(
    x: Tensor, x_scales: Tensor | None, tiles: Tiles, activations: Activations, dtype: torch.dtype
) -> Tensor:
    m = x.shape[0]
    if not m:
        return x.new_empty(0, tiles.rows, dtype=dtype)
    chosen = _chosen(x, tiles, activations, dtype)
    split = _splits(x, tiles, chosen)
    y = _output(x, (m, tiles.rows), split, dtype)
    grid = (_ceil_div(tiles.rows, chosen.block_n), _ceil_div(m, chosen.block_m), split)
    _run(
        linear, grid, x, x if x_scales is None else x_scales, _weight(tiles), y, m, x.shape[1], FORMAT=_format(tiles),
        INPUTS=activations, BLOCK_N=chosen.block_n, BLOCK_M=chosen.block_m, SPLIT=split,
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return _added_up(y, dtype)


def _multiply_row(x: Tensor, tiles: Tiles) -> Tensor:
    chosen = _chosen(x, tiles, "float", x.dtype)
    split = _splits(x, tiles, chosen)
    y = _output(x, (1, tiles.rows), split, x.dtype)
    grid = (_ceil_div(tiles.rows, chosen.block_n), split)
    _run(
        gemv, grid, x, _weight(tiles), y, x.shape[1], FORMAT=_format(tiles), BLOCK_N=chosen.block_n, SPLIT=split,
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return _added_up(y, x.dtype)


def _multiply_by_slabs(x: Tensor, tiles: Tiles) -> Tensor:
    return torch.cat([F.linear(x, slab) for _, slab in slabs(tiles, x.dtype)], dim=1)


def _splits(x: Tensor, tiles: Tiles, chosen: Config) -> int:
    count = _ceil_div(tiles.rows, chosen.block_n) * _ceil_div(x.shape[0], chosen.block_m)
    return splits(count, tiles.slabs, chosen.programs * processors_of(x))


def _output(x: Tensor, shape: tuple[int, int], split: int, dtype: torch.dtype) -> Tensor:
    """The output of a kernel: the result, or a part of the sum for each split."""
    return x.new_empty(shape, dtype=dtype) if split == 1 else x.new_empty((split, *shape), dtype=torch.float32)


def _added_up(y: Tensor, dtype: torch.dtype) -> Tensor:
    if y.dim() == 2:
        return y
    total = torch.empty_like(y[0], dtype=dtype)
    grid = (_ceil_div(total.numel(), ADD_UP_BLOCK),)
    _run(add_up, grid, y, total, total.numel(), SPLIT=y.shape[0], BLOCK=ADD_UP_BLOCK)
    return total


def _pad_groups(x: Tensor, tiles: Tiles) -> Tensor:
    """`x` with zeros in the padding of the weight's groups."""
    groups = F.pad(x, (0, -x.shape[1] % tiles.group)).unflatten(1, (-1, tiles.group))
    return F.pad(groups, (0, tiles.group_parts * tiles.width - tiles.group)).flatten(1)


def _weight(tiles: Tiles) -> WeightArgs:
    """The arguments of a weight; another tensor stands in for an absent one."""
    low, high = tiles.low, tiles.high
    return WeightArgs(
        low=low,
        high=low if high is None else high,
        scales=tiles.scales,
        zeros=tiles.scales if tiles.zeros is None else tiles.zeros,
        codebook=low if tiles.codebook is None else tiles.codebook,
        rows=tiles.rows,
        groups=tiles.scales.shape[0],
        low_bytes=low.stride(0),
        high_bytes=0 if high is None else high.stride(0),
        slabs=tiles.slabs,
    )


def _format(tiles: Tiles, per_row: bool = True) -> Format:
    """The constants of a weight; `per_row` lets a kernel treat a single group as one scale per row."""
    zeros = "none" if tiles.zeros is None else "real" if tiles.real else "integer"
    group_parts = 0 if per_row and tiles.scales.shape[0] == 1 else tiles.group_parts
    return Format(tiles.bits, tiles.width, tiles.parts, group_parts, zeros, tiles.codebook is not None)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()

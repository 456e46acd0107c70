"""The CPU kernels' layout of a weight: panels of rows, one row per vector lane (drawn in lmpress_cpu.c). Never stored.

`pack` and `unpack` are exact inverses, so a layer that serves from panels needs no second copy of its codes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weight import Weight

# Stored bits: the planes of bits that make up a code, low ones first; a block holds 32 // (narrowest plane) columns.
ROWS_AT_ONCE = 256  # of a weight: a multiple of all lanes, and what is made on the way stays in the cache
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
TABLE_BITS = 4  # of codes that are looked up, however much of their groups is padding


@dataclass(frozen=True)
class Panels:
    """A weight as the compiled kernels read it.

    packed           the codes, uint8 `[panels, bytes]`
    scales, offsets  `[panels, groups, lanes]`, float16 where that holds all of them exactly, else float32
    table            float32 `[16]` that codes stand for, or None
    levels, grids    in place of scales and offsets: the codes of both and their grids, as `Levels` has them
    kept, apart      columns whose codes do not count, int32 `[c]`, and their weights, float16 `[panels, c, lanes]`
    """

    packed: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    table: Tensor | None
    levels: Tensor | None
    grids: Tensor | None
    kept: Tensor | None
    apart: Tensor | None
    rows: int
    columns: int
    group: int
    bits: int
    center: int


def block_columns(bits: int) -> int:
    """Columns in the smallest run of whole vectors."""
    return 32 // min(PLANES[bits])


def padded_columns(columns: int, group: int, bits: int) -> int:
    """Columns in memory: every group is filled up to whole blocks."""
    block, last = block_columns(bits), columns % group or min(group, columns)
    return (columns - last) // group * _ceil(group, block) + _ceil(last, block)


def stored_bits(bits: int, columns: int, group: int) -> int:
    """How wide codes of `bits` bits are stored: whatever takes least memory, padding included, then least padding."""
    padded = {b: padded_columns(columns, group, b) for b in PLANES if b >= bits}
    return min(padded, key=lambda b: (b * padded[b], padded[b]))


def pack(weight: Weight, lanes: int) -> Panels:
    """Arrange `weight` for `lanes` rows at a time."""
    rows, columns = weight.shape
    bits = TABLE_BITS if weight.codebook is not None else stored_bits(weight.bits, columns, weight.group)
    center = 0 if weight.codebook is not None else 2 ** (weight.bits - 1)
    levels = weight.levels
    scales = None if levels else weight.scale.float()
    offsets = None if weight.zero is None or levels else weight.zero.float() - center
    narrow = all(each is None or torch.equal(each.half().float(), each) for each in (scales, offsets))
    dtype = torch.float16 if narrow else torch.float32
    table = None if weight.codebook is None else weight.codebook.float()
    return Panels(
        packed=torch.cat([_panels(each, weight.group, bits, lanes) for each in weight.codes.split(ROWS_AT_ONCE)]),
        scales=None if scales is None else _by_lane(scales.to(dtype), lanes),
        offsets=None if offsets is None else _by_lane(offsets.to(dtype), lanes),
        table=table,
        levels=levels and levels.codes,
        grids=levels and levels.grids,
        kept=None if weight.columns is None else weight.columns.to(torch.int32),
        apart=None if weight.outliers is None else _by_lane(weight.outliers.half(), lanes),
        rows=rows,
        columns=columns,
        group=weight.group,
        bits=bits,
        center=center,
    )


def unpack(codes: Tensor, lanes: int, rows: int, columns: int, group: int, bits: int) -> Tensor:
    """The codes uint8 `[rows, columns]` that `pack` arranged."""
    panels, block = codes.shape[0], block_columns(bits)
    vectors = codes.view(panels, -1, sum(PLANES[bits]) * block // 32, lanes, 4)
    quads = torch.zeros(panels, vectors.shape[1], block // 4, lanes, 4, dtype=torch.uint8)
    vector = below = 0
    for plane in PLANES[bits]:
        for quad in range(block // 4):
            place, shift = divmod(quad * plane, 8)
            quads[:, :, quad] |= ((vectors[:, :, vector + place] >> shift) & (2**plane - 1)) << below
        vector, below = vector + block * plane // 32, below + plane
    flat = quads.permute(0, 3, 1, 2, 4).reshape(panels * lanes, -1)[:rows]
    return flat if flat.shape[1] == columns else flat[:, _places(columns, group, bits)]


def _panels(codes: Tensor, group: int, bits: int, lanes: int) -> Tensor:
    """Codes uint8 `[rows, columns]` in panels `[panels, bytes]`, groups filled up with zeros and panels with rows of them."""
    missing, padded = -len(codes) % lanes, _pad_groups(codes, group, bits)
    return _interleave(F.pad(padded, (0, 0, 0, missing)) if missing else padded, bits, lanes)


def _interleave(codes: Tensor, bits: int, lanes: int) -> Tensor:
    """uint8 `[rows, padded]` to `[panels, bytes]`: blocks of vectors, 4 columns in the bytes of each lane."""
    block = block_columns(bits)
    quads = codes.view(len(codes) // lanes, lanes, -1, block // 4, 4).permute(0, 2, 3, 1, 4)
    vectors, below = [], 0
    for plane in PLANES[bits]:
        digits = (quads >> below) & (2**plane - 1)
        for run in digits.split(8 // plane, dim=2):
            vector = torch.zeros_like(run[:, :, 0])
            for place in range(run.shape[2]):
                vector |= run[:, :, place] << (place * plane)
            vectors.append(vector)
        below += plane
    return torch.stack(vectors, dim=2).reshape(len(codes) // lanes, -1).contiguous()


def _pad_groups(codes: Tensor, group: int, bits: int) -> Tensor:
    columns = codes.shape[1]
    width = padded_columns(columns, group, bits)
    if width == columns:
        return codes
    padded = torch.zeros(len(codes), width, dtype=torch.uint8)
    padded[:, _places(columns, group, bits)] = codes
    return padded


def _places(columns: int, group: int, bits: int) -> Tensor:
    """Where each column stands in memory."""
    column = torch.arange(columns)
    return column // group * _ceil(min(group, columns), block_columns(bits)) + column % group


def _by_lane(values: Tensor, lanes: int) -> Tensor:
    """`[rows, n]` to `[panels, n, lanes]`, rows that are missing filled with zeros."""
    rows, count = values.shape
    padded = F.pad(values, (0, 0, 0, -rows % lanes))
    return padded.view(math.ceil(rows / lanes), lanes, count).transpose(1, 2).contiguous()


def _ceil(count: int, unit: int) -> int:
    return math.ceil(count / unit) * unit

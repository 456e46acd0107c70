"""The CPU kernels' layout of a weight: panels of rows, one row per vector lane (drawn in lmpress_cpu.c). It is never stored.

`pack` and `unpack` are exact inverses, so a layer whose weight is in panels needs no second copy of its codes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weight import Weight

ROWS_AT_ONCE = 256  # of a weight that are packed: a multiple of all lanes, with intermediate results that fit the cache
# Stored bits: the planes of bits that make up a code, low ones first; a block holds 32 // (narrowest plane) columns.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
TABLE_BITS = 4  # of codes of a codebook, however much of their groups is padding


@dataclass(frozen=True)
class Panels:
    """A weight as the compiled kernels read it.

    packed           the codes, uint8 `[panels, bytes]`
    scales, offsets  `[panels, groups, lanes]`, float16 if that holds all of them exactly, else float32; an offset is the zero
                     point minus the center
    codebook         float32 `[16]`, or None for a uniform grid
    bilevel_codes, bilevel_grids  instead of scales and offsets (SpQR): the codes of both and their grids, as `Levels` has them
    outlier_columns, outliers     columns whose codes do not count, int32 `[c]`, and their weights, float16 `[panels, c, lanes]`
    center           the code of zero if there are no offsets
    """

    packed: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    codebook: Tensor | None
    bilevel_codes: Tensor | None
    bilevel_grids: Tensor | None
    outlier_columns: Tensor | None
    outliers: Tensor | None
    rows: int
    columns: int
    group: int
    bits: int
    center: int


def block_columns(bits: int) -> int:
    """Columns per block, the smallest run that fills whole vectors."""
    return 32 // min(PLANES[bits])


def padded_columns(columns: int, group: int, bits: int) -> int:
    """Columns in memory: every group is padded to whole blocks."""
    block, last = block_columns(bits), columns % group or min(group, columns)
    return (columns - last) // group * _ceil(group, block) + _ceil(last, block)


def stored_bits(bits: int, columns: int, group: int) -> int:
    """The width in bits in which codes of `bits` bits take the least memory, padding included; of equals, the least padding."""
    padded = {b: padded_columns(columns, group, b) for b in PLANES if b >= bits}
    return min(padded, key=lambda b: (b * padded[b], padded[b]))


def pack(weight: Weight, lanes: int) -> Panels:
    """Pack `weight` into panels of `lanes` rows."""
    rows, columns = weight.shape
    bits = TABLE_BITS if weight.codebook is not None else stored_bits(weight.bits, columns, weight.group)
    center = 0 if weight.codebook is not None else 2 ** (weight.bits - 1)
    levels = weight.levels
    scales = None if levels else weight.scale.float()
    offsets = None if weight.zero is None or levels else weight.zero.float() - center
    narrow = all(each is None or torch.equal(each.half().float(), each) for each in (scales, offsets))
    dtype = torch.float16 if narrow else torch.float32
    return Panels(
        packed=torch.cat([_panels(each, weight.group, bits, lanes) for each in weight.codes.split(ROWS_AT_ONCE)]),
        scales=None if scales is None else _by_lane(scales.to(dtype), lanes),
        offsets=None if offsets is None else _by_lane(offsets.to(dtype), lanes),
        codebook=None if weight.codebook is None else weight.codebook.float(),
        bilevel_codes=levels and levels.codes,
        bilevel_grids=levels and levels.grids,
        outlier_columns=None if weight.columns is None else weight.columns.to(torch.int32),
        outliers=None if weight.outliers is None else _by_lane(weight.outliers.half(), lanes),
        rows=rows,
        columns=columns,
        group=weight.group,
        bits=bits,
        center=center,
    )


def unpack(codes: Tensor, lanes: int, rows: int, columns: int, group: int, bits: int) -> Tensor:
    """The codes uint8 `[rows, columns]` that `pack` packed into `codes` uint8 `[panels, bytes]`."""
    panels, block = codes.shape[0], block_columns(bits)
    vectors = codes.view(panels, -1, sum(PLANES[bits]) * block // 32, lanes, 4)
    quads = torch.zeros(panels, vectors.shape[1], block // 4, lanes, 4, dtype=torch.uint8)
    vector = below = 0
    for plane in PLANES[bits]:
        for quad in range(block // 4):
            index, shift = divmod(quad * plane, 8)
            quads[:, :, quad] |= ((vectors[:, :, vector + index] >> shift) & (2**plane - 1)) << below
        vector, below = vector + block * plane // 32, below + plane
    padded = quads.permute(0, 3, 1, 2, 4).reshape(panels * lanes, -1)[:rows]
    return padded if padded.shape[1] == columns else padded[:, _positions(columns, group, bits)]


def _panels(codes: Tensor, group: int, bits: int, lanes: int) -> Tensor:
    """Codes uint8 `[rows, columns]` in panels `[panels, bytes]`; groups and the last panel are padded with zeros."""
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
            for digit in range(run.shape[2]):
                vector |= run[:, :, digit] << (digit * plane)
            vectors.append(vector)
        below += plane
    return torch.stack(vectors, dim=2).reshape(len(codes) // lanes, -1).contiguous()


def _pad_groups(codes: Tensor, group: int, bits: int) -> Tensor:
    columns = codes.shape[1]
    width = padded_columns(columns, group, bits)
    if width == columns:
        return codes
    padded = torch.zeros(len(codes), width, dtype=torch.uint8)
    padded[:, _positions(columns, group, bits)] = codes
    return padded


def _positions(columns: int, group: int, bits: int) -> Tensor:
    """The position of each column in memory, int64 `[columns]`."""
    column = torch.arange(columns)
    return column // group * _ceil(min(group, columns), block_columns(bits)) + column % group


def _by_lane(values: Tensor, lanes: int) -> Tensor:
    """`[rows, n]` to `[panels, n, lanes]`, padded with rows of zeros."""
    rows, count = values.shape
    padded = F.pad(values, (0, 0, 0, -rows % lanes))
    return padded.view(math.ceil(rows / lanes), lanes, count).transpose(1, 2).contiguous()


def _ceil(count: int, unit: int) -> int:
    return math.ceil(count / unit) * unit

"""The GPU kernels' layout of a weight: parts of columns that share their bytes. It is never stored.

A *part* is `width` neighbouring columns of one group, the operand of one dot product. A code of 3 bits is cut into two
*planes* of 2 and 1 bits, other codes are one plane. Byte `j` of a plane of `b` bits holds column `j` of `8 / b` consecutive
parts, the first in its low bits: a tile of bytes gives as many operands as it has digits, by one shift each, and values stay in
their registers. A *slab* is the smallest run of parts that fills whole bytes in all planes.

Codes of 5 to 8 bits are stored in 8 bits, signed (`code - 128`): as int8 operands they need no arithmetic. The center of every
grid is moved to that of its plane: codes of 5 bits are stored 112 higher.

`pack` and `unpack` are exact inverses.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weight import Weight

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
SIGN = 128  # the sign bit of stored 8-bit codes
WIDEST, NARROWEST, NARROWEST_INT8 = 64, 16, 32  # columns of a part: the fewest that a matrix instruction takes


@dataclass(frozen=True)
class Tiles:
    """A weight in parts.

    low, high  uint8 `[rows, bytes]`: the planes; `high` is None if there is one
    scales     `[groups, rows]`, in the dtype of the weight's scales
    zeros      `[groups, rows]`: zero point minus center, None if all are 0; integers in the dtype of the scales, or float32 if
               `real`
    codebook   float32 `[2**bits]`, or None for a uniform grid
    """

    low: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    codebook: Tensor | None
    rows: int
    columns: int
    group: int
    bits: int
    width: int
    real: bool = False

    @property
    def parts(self) -> int:
        """Parts of a slab."""
        return 8 // min(PLANES[self.bits])

    @property
    def group_parts(self) -> int:
        """Parts of a group."""
        return math.ceil(self.group / self.width)

    @property
    def slabs(self) -> int:
        """Slabs of a row."""
        return self.low.shape[1] * 8 // PLANES[self.bits][0] // (self.parts * self.width)

    @property
    def padded(self) -> bool:
        """Whether groups inside a row are padded, so that columns have other positions in memory than in the layer."""
        return self.group % self.width != 0 and self.group < self.columns


def stored_bits(bits: int) -> int:
    """The width in which codes of `bits` bits are stored."""
    return min(b for b in PLANES if b >= bits)


def pack(weight: Weight, int8: bool = False) -> Tiles:
    """Pack `weight`; its parts are wider if its operands will be `int8`."""
    rows, columns = weight.shape
    bits, group = stored_bits(weight.bits), min(weight.group, columns)
    width = part_width(group, columns, int8)
    parts = 8 // min(PLANES[bits])
    position = positions(columns, group, width)
    total = math.ceil((int(position[-1]) + 1) / (parts * width)) * parts * width
    codes = torch.zeros(rows, total, dtype=torch.uint8, device=weight.codes.device)
    codes[:, position.to(codes.device)] = weight.codes + center_shift(weight.bits)
    if bits == 8:
        codes ^= SIGN
    planes, below = [], 0
    for plane in PLANES[bits]:
        planes.append(_plane(codes >> below & 2**plane - 1, plane, width))
        below += plane
    zeros, real = _zeros(weight)
    return Tiles(
        low=planes[0],
        high=planes[1] if len(planes) > 1 else None,
        scales=weight.scale.T.contiguous(),
        zeros=zeros,
        codebook=weight.codebook,
        rows=rows,
        columns=columns,
        group=group,
        bits=bits,
        width=width,
        real=real,
    )


def unpack(tiles: Tiles, bits: int) -> Tensor:
    """The codes uint8 `[rows, columns]` of a weight of `bits` bits that `pack` packed."""
    codes, below = torch.zeros((), dtype=torch.uint8, device=tiles.low.device), 0
    for plane, stored in zip(PLANES[tiles.bits], (tiles.low, tiles.high), strict=False):
        assert stored is not None
        shifts = torch.arange(0, 8, plane, dtype=torch.uint8, device=stored.device)
        digits = stored.unflatten(1, (-1, 1, tiles.width)) >> shifts.unsqueeze(1) & 2**plane - 1
        codes, below = codes | digits.flatten(1) << below, below + plane
    if tiles.bits == 8:
        codes ^= SIGN
    position = positions(tiles.columns, tiles.group, tiles.width).to(codes.device)
    return codes[:, position] - center_shift(bits)


def center_shift(bits: int) -> int:
    """The number that is added to stored codes of `bits` bits, so that their center is that of the plane."""
    return 2 ** (stored_bits(bits) - 1) - 2 ** (bits - 1)


def part_width(group: int, columns: int, int8: bool) -> int:
    """The widest part that fills groups without padding; the narrowest if there is none."""
    narrowest = NARROWEST_INT8 if int8 else NARROWEST
    if group == columns:
        return WIDEST
    return next((w for w in (64, 32, 16) if w >= narrowest and group % w == 0), narrowest)


def positions(columns: int, group: int, width: int) -> Tensor:
    """The position of each column in memory, int64 `[columns]`."""
    column = torch.arange(columns)
    return column // group * (math.ceil(group / width) * width) + column % group


def _plane(digits: Tensor, plane: int, width: int) -> Tensor:
    shared = digits.unflatten(1, (-1, 8 // plane, width))
    shifts = torch.arange(0, 8, plane, dtype=torch.uint8, device=digits.device)
    return (shared << shifts.unsqueeze(1)).sum(2, dtype=torch.uint8).flatten(1).contiguous()


def _zeros(weight: Weight) -> tuple[Tensor | None, bool]:
    """Zero points minus centers as they are stored, and whether they are real."""
    if weight.zero is None:
        return None, False
    zeros = (weight.zero.float() - 2 ** (weight.bits - 1)).T.contiguous()
    real = bool((zeros != zeros.round()).any() or zeros.abs().max() > SIGN)
    return (zeros, True) if real else (zeros.to(weight.scale.dtype), False)

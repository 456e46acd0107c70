"""The head that the products share: the arguments of a weight, the loads of its bytes, and operands made of its codes.

A float whose exponent makes one unit of its last place equal to 1 takes a code into its mantissa: 1024 + code in float16,
128 + code in bfloat16 (codes below 128), 2**23 + code in float32. Subtracting that number plus the zero leaves `code - zero`
exactly, without a conversion of integers, which GPUs do at a fraction of their speed. 8-bit codes are stored signed: the
exclusive or that sets the exponent also flips their sign bit back.
"""

from typing import NamedTuple

import torch

import triton
import triton.language as tl


class WeightArgs(NamedTuple):
    """A weight in parts as an argument of a kernel; see `layout.Tiles`. A kernel does not read a tensor that stands in for an
    absent one."""

    low: torch.Tensor  # uint8 [rows, low_bytes]
    high: torch.Tensor  # uint8 [rows, high_bytes], if there are two planes
    scales: torch.Tensor  # [groups, rows]
    zeros: torch.Tensor  # [groups, rows], unless FORMAT.zeros is "none"
    codebook: torch.Tensor  # float32 [2**bits], if FORMAT.codebook
    rows: int
    groups: int
    low_bytes: int
    high_bytes: int
    slabs: int


class Format(NamedTuple):
    """What a kernel is compiled for: the constants of a weight."""

    bits: int
    width: int  # columns of a part
    parts: int  # of a slab
    group_parts: int  # 0: one scale per row
    zeros: str  # "none", "integer", "real"
    codebook: bool


@triton.jit
def plane_pointers(weight, rows, FORMAT: tl.constexpr):
    """Pointers `[rows, width]` to the first bytes of the given rows in both planes."""
    row, column = rows.to(tl.int64)[:, None], tl.arange(0, FORMAT.width)[None, :]
    return weight.low + (row * weight.low_bytes + column), weight.high + (row * weight.high_bytes + column)


@triton.jit
def load_low(pointers, before, slab, p, row_ok, FORMAT: tl.constexpr, EVICT: tl.constexpr):
    """Bytes of the low plane for part `p` of a slab: those of the part `before`, until all of its bits are used."""
    shared: tl.constexpr = parts_per_byte(FORMAT.bits)
    tile = before
    if p % shared == 0:
        at = (slab * (FORMAT.parts // shared) + p // shared) * FORMAT.width
        tile = tl.load(pointers + at, mask=row_ok[:, None], other=0, eviction_policy=EVICT)
    return tile


@triton.jit
def load_high(pointers, before, slab, row_ok, FORMAT: tl.constexpr, EVICT: tl.constexpr):
    """Bytes of the high plane for all parts of a slab, or `before` if there is one plane."""
    tile = before
    if FORMAT.bits == 3:
        tile = tl.load(pointers + slab * FORMAT.width, mask=row_ok[:, None], other=0, eviction_policy=EVICT)
    return tile


@triton.constexpr_function
def parts_per_byte(bits):
    """Parts that share a byte of the low plane."""
    return {8: 1, 4: 2, 3: 4, 2: 4}[bits]


@triton.jit
def part_codes(low_bytes, high_bytes, p: tl.constexpr, FORMAT: tl.constexpr):
    """Codes of part `p` of a slab, uint8; 8-bit codes as they are stored."""
    shared: tl.constexpr = parts_per_byte(FORMAT.bits)
    if FORMAT.bits == 8:
        codes = low_bytes
    elif FORMAT.bits == 4:
        codes = low_bytes >> (4 * (p % shared)) & 15
    elif FORMAT.bits == 2:
        codes = low_bytes >> (2 * (p % shared)) & 3
    else:
        codes = (low_bytes >> (2 * (p % shared)) & 3) | (high_bytes >> p & 1) << 2
    return codes


@triton.jit
def load_group(values, group, weight, rows, row_ok):
    """The scales or zeros of one group, float32 `[rows, 1]`."""
    return tl.load(values + group * weight.rows + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]


@triton.jit
def as_floats(codes, zero, weight, FORMAT: tl.constexpr):
    """Entries of the codebook, or `code - center - zero`: float32."""
    if FORMAT.codebook:
        values = from_codebook(codes, weight.codebook, tl.float32)
    elif FORMAT.zeros == "integer":
        values = subtract_zero(codes, zero, FORMAT.bits, tl.float32)
    else:
        values = subtract_zero(codes, 0.0, FORMAT.bits, tl.float32) - zero
    return values


@triton.jit
def subtract_zero(codes, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """`code - center - zero` in DTYPE, exact; `zero` is a float32 tensor that broadcasts to `codes`, or 0.0."""
    center: tl.constexpr = 2 ** (BITS - 1)
    sign: tl.constexpr = 128 if BITS == 8 else 0
    if DTYPE == tl.float16:
        base = (zero + (1024.0 + center)).to(tl.float16)
        values = (codes.to(tl.uint16) ^ (0x6400 + sign)).to(tl.float16, bitcast=True) - base
    elif DTYPE == tl.bfloat16 and BITS < 8:
        base = (zero + (128.0 + center)).to(tl.bfloat16)
        values = (codes.to(tl.uint16) ^ 0x4300).to(tl.bfloat16, bitcast=True) - base
    else:
        base = zero + (8388608.0 + center)
        values = ((codes.to(tl.uint32) ^ (0x4B000000 + sign)).to(tl.float32, bitcast=True) - base).to(DTYPE)
    return values


@triton.jit
def from_codebook(codes, codebook, DTYPE: tl.constexpr):
    """The entries of the codebook, in DTYPE."""
    return tl.load(codebook + codes.to(tl.int32)).to(DTYPE)


@triton.jit
def as_int8(codes, BITS: tl.constexpr):
    """`code - center` as int8; 8-bit codes are stored as that."""
    if BITS == 8:
        values = codes.to(tl.int8, bitcast=True)
    else:
        values = codes.to(tl.int8, bitcast=True) - 2 ** (BITS - 1)
    return values

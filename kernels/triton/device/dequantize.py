"""Rows of the weight as floats, for products of many rows of x, which are better off with the vendor's own kernel."""

import triton
import triton.language as tl

from .decode import floats, looked_up, part_codes


@triton.jit
def dequantize(
    low,
    high,
    scales,
    zeros,
    table,
    out,  # [count, columns]
    start,
    count,
    n,
    columns,
    group_columns,
    groups,
    low_bytes,
    high_bytes,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_PARTS: tl.constexpr,
    ZEROS: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The rows `start .. start + count - 1`; a program makes a slab of BLOCK_N of them."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slab = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    row_ok = row < count
    rows = start + row
    LOW_PARTS: tl.constexpr = 1 if BITS == 8 else 2 if BITS == 4 else 4
    low += rows.to(tl.int64)[:, None] * low_bytes + column[None, :]
    high += rows.to(tl.int64)[:, None] * high_bytes + column[None, :]
    out += row.to(tl.int64)[:, None] * columns
    low_tile = tl.zeros((BLOCK_N, WIDTH), tl.uint8)
    high_tile = tl.zeros((BLOCK_N, WIDTH), tl.uint8)
    if BITS == 3:
        high_tile = tl.load(high + slab * WIDTH, mask=row_ok[:, None], other=0)
    for p in tl.static_range(PARTS):
        if p % LOW_PARTS == 0:
            at = (slab * (PARTS // LOW_PARTS) + p // LOW_PARTS) * WIDTH
            low_tile = tl.load(low + at, mask=row_ok[:, None], other=0)
        part = slab * PARTS + p
        group = part // GROUP_PARTS
        inside = part % GROUP_PARTS * WIDTH + column
        place = group * group_columns + inside
        group = min(group, groups - 1)
        codes = part_codes(low_tile, high_tile, p if BITS == 3 else p % LOW_PARTS, BITS)
        zero = tl.zeros((BLOCK_N, 1), tl.float32)
        if ZEROS != "none":
            zero = tl.load(zeros + group * n + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        if TABLE:
            values = looked_up(codes, table, tl.float32)
        elif ZEROS == "integer":
            values = floats(codes, zero, BITS, tl.float32)
        else:
            values = floats(codes, 0.0, BITS, tl.float32) - zero
        values *= tl.load(scales + group * n + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        ok = row_ok[:, None] & ((inside < group_columns) & (place < columns))[None, :]
        tl.store(out + place[None, :], values.to(out.dtype.element_ty), mask=ok)

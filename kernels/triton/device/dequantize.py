"""Rows of the weight as floats, for products of many rows of x, for which the vendor's own kernel is faster."""

import triton
import triton.language as tl

from .weight import as_floats, load_group, load_high, load_low, part_codes, plane_pointers


@triton.jit
def dequantize(
    out,  # [count, columns]
    weight,  # WeightArgs
    start,
    count,
    columns,
    group_columns,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The rows `start .. start + count - 1`; a program makes a slab of BLOCK_N of them."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slab = tl.program_id(1)
    WIDTH: tl.constexpr = FORMAT.width
    PARTS: tl.constexpr = FORMAT.parts
    column = tl.arange(0, WIDTH)
    row_ok = row < count
    rows = start + row
    low, high = plane_pointers(weight, rows, FORMAT)
    out += row.to(tl.int64)[:, None] * columns
    low_bytes = tl.zeros((BLOCK_N, WIDTH), tl.uint8)
    high_bytes = load_high(high, low_bytes, slab, row_ok, FORMAT, "")
    for p in tl.static_range(PARTS):
        low_bytes = load_low(low, low_bytes, slab, p, row_ok, FORMAT, "")
        part = slab * PARTS + p
        group = part // FORMAT.group_parts
        inside = part % FORMAT.group_parts * WIDTH + column
        place = group * group_columns + inside
        group = min(group, weight.groups - 1)
        codes = part_codes(low_bytes, high_bytes, p, FORMAT)
        zero = tl.zeros((BLOCK_N, 1), tl.float32)
        if FORMAT.zeros != "none":
            zero = load_group(weight.zeros, group, weight, rows, row_ok)
        values = as_floats(codes, zero, weight, FORMAT) * load_group(weight.scales, group, weight, rows, row_ok)
        ok = row_ok[:, None] & ((inside < group_columns) & (place < columns))[None, :]
        tl.store(out + place[None, :], values.to(out.dtype.element_ty), mask=ok)

"""y = x W^T for a single row of x, by plain multiplications: a tile of the weight by a stretch of x, summed at the end."""

import triton
import triton.language as tl

from .decode import floats, looked_up, part_codes


@triton.jit
def gemv(
    x,  # [width]
    low,
    high,
    scales,
    zeros,
    table,
    y,  # [n], or float32 [SPLIT, n]
    n,
    width,
    groups,
    low_bytes,
    high_bytes,
    slabs,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_PARTS: tl.constexpr,  # 0: one scale a row
    ZEROS: tl.constexpr,  # "none", "integer", "real"
    TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(slabs, SPLIT)
    first = tl.program_id(1) * share
    column = tl.arange(0, WIDTH)
    row_ok = rows < n
    LOW_PARTS: tl.constexpr = 1 if BITS == 8 else 2 if BITS == 4 else 4
    low += rows.to(tl.int64)[:, None] * low_bytes + column[None, :]
    high += rows.to(tl.int64)[:, None] * high_bytes + column[None, :]
    sums = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    zero = tl.zeros((BLOCK_N, 1), tl.float32)
    scale = tl.zeros((BLOCK_N, 1), tl.float32)
    if GROUP_PARTS == 0:
        scale = tl.load(scales + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        if ZEROS != "none":
            zero = tl.load(zeros + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    for slab in range(first, min(first + share, slabs)):
        low_tile = tl.zeros((BLOCK_N, WIDTH), tl.uint8)
        high_tile = tl.zeros((BLOCK_N, WIDTH), tl.uint8)
        if BITS == 3:
            high_tile = tl.load(high + slab * WIDTH, mask=row_ok[:, None], other=0, eviction_policy="evict_first")
        for p in tl.static_range(PARTS):
            if p % LOW_PARTS == 0:
                at = (slab * (PARTS // LOW_PARTS) + p // LOW_PARTS) * WIDTH
                low_tile = tl.load(low + at, mask=row_ok[:, None], other=0, eviction_policy="evict_first")
            part = slab * PARTS + p
            xs = tl.load(x + part * WIDTH + column, mask=part * WIDTH + column < width, other=0.0).to(tl.float32)
            codes = part_codes(low_tile, high_tile, p if BITS == 3 else p % LOW_PARTS, BITS)
            if GROUP_PARTS > 0:
                group = min(part // GROUP_PARTS, groups - 1)
                scale = tl.load(scales + group * n + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
                if ZEROS != "none":
                    zero = tl.load(zeros + group * n + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
            if TABLE:
                ws = looked_up(codes, table, tl.float32)
            elif ZEROS == "integer":
                ws = floats(codes, zero, BITS, tl.float32)
            else:
                ws = floats(codes, 0.0, BITS, tl.float32) - zero
            if GROUP_PARTS == 0:
                sums += ws * xs[None, :]
            else:
                sums += ws * (scale * xs[None, :])
    out = tl.sum(sums, axis=1)
    if GROUP_PARTS == 0:
        out *= tl.sum(scale, axis=1)
    tl.store(y + tl.program_id(1).to(tl.int64) * n + rows, out.to(y.dtype.element_ty), mask=row_ok)

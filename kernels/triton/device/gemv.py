"""y = x W^T for a single row of x, without matrix instructions: a tile of the weight times a run of x, summed at the end."""

import triton
import triton.language as tl

from .weight import as_floats, load_group, load_high, load_low, part_codes, plane_pointers


@triton.jit
def gemv(
    x,  # [width]
    weight,  # WeightArgs
    y,  # [rows], or float32 [SPLIT, rows]
    width,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(weight.slabs, SPLIT)
    first = tl.program_id(1) * share
    WIDTH: tl.constexpr = FORMAT.width
    PARTS: tl.constexpr = FORMAT.parts
    column = tl.arange(0, WIDTH)
    row_ok = rows < weight.rows
    low, high = plane_pointers(weight, rows, FORMAT)
    sums = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    zero = tl.zeros((BLOCK_N, 1), tl.float32)
    scale = tl.zeros((BLOCK_N, 1), tl.float32)
    if FORMAT.group_parts == 0:
        scale = load_group(weight.scales, 0, weight, rows, row_ok)
        if FORMAT.zeros != "none":
            zero = load_group(weight.zeros, 0, weight, rows, row_ok)
    for slab in range(first, min(first + share, weight.slabs)):
        low_bytes = tl.zeros((BLOCK_N, WIDTH), tl.uint8)
        high_bytes = load_high(high, low_bytes, slab, row_ok, FORMAT, "evict_first")
        for p in tl.static_range(PARTS):
            low_bytes = load_low(low, low_bytes, slab, p, row_ok, FORMAT, "evict_first")
            part = slab * PARTS + p
            at = part * WIDTH
            xs = tl.load(x + at + column, mask=at + column < width, other=0.0).to(tl.float32)
            codes = part_codes(low_bytes, high_bytes, p, FORMAT)
            if FORMAT.group_parts > 0:
                group = min(part // FORMAT.group_parts, weight.groups - 1)
                scale = load_group(weight.scales, group, weight, rows, row_ok)
                if FORMAT.zeros != "none":
                    zero = load_group(weight.zeros, group, weight, rows, row_ok)
            ws = as_floats(codes, zero, weight, FORMAT)
            if FORMAT.group_parts == 0:
                sums += ws * xs[None, :]
            else:
                sums += ws * (scale * xs[None, :])
    out = tl.sum(sums, axis=1)
    if FORMAT.group_parts == 0:
        out *= tl.sum(scale, axis=1)
    tl.store(y + tl.program_id(1).to(tl.int64) * weight.rows + rows, out.to(y.dtype.element_ty), mask=row_ok)

"""y = x W^T by matrix instructions, the weight as the left operand: its bytes become operands in registers.

    y[m, n] = sum over groups g of scale[n, g] * (sum over k in g of (code[n, k] - zero[n, g]) * x[m, k])

The inner sum meets exact small integers (or the codebook's values): scales are applied to sums, in float32. Integer zeros
are subtracted on the way to the operand, real ones leave the sum as `zero * sum of x`. With int8 inputs the inner sum is one
of integers, and `x_scale[m, g]` (`x_scale[m]` per token) is applied beside the weight's.

Few rows of x give few programs: `SPLIT` programs share the columns of one tile, each leaves its part of the sum in a
workspace, and `add_up` adds them in order. Results are the same bits in every run.
"""

import triton
import triton.language as tl

from .decode import floats, int8s, looked_up, part_codes


@triton.jit
def linear(
    x,  # [m, width] float, or int8 with groups filled up
    x_scales,  # float32 [m, groups] or [m]
    low,
    high,
    scales,
    zeros,
    table,
    y,  # [m, n], or float32 [SPLIT, m, n]
    m,
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
    INPUTS: tl.constexpr,  # "float", "group" (several of them), "token"
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    share = tl.cdiv(slabs, SPLIT)
    first = tl.program_id(2) * share
    column = tl.arange(0, WIDTH)
    row_ok, batch_ok = rows < n, batch < m
    # Columns of 2, 3 and 4 bits per byte of the low plane; 8 parts per byte of the high one.
    LOW_PARTS: tl.constexpr = 1 if BITS == 8 else 2 if BITS == 4 else 4
    low += rows.to(tl.int64)[:, None] * low_bytes + column[None, :]
    high += rows.to(tl.int64)[:, None] * high_bytes + column[None, :]
    x += batch.to(tl.int64)[None, :] * width + column[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INPUTS == "token" and GROUP_PARTS == 0 else tl.float32)
    shifts = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    row_zero = 0.0
    if ZEROS == "integer" and GROUP_PARTS == 0:
        row_zero = tl.load(zeros + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
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
            inside = (part * WIDTH + column < width)[:, None] & batch_ok[None, :]
            xs = tl.load(x + part * WIDTH, mask=inside, other=0.0)
            codes = part_codes(low_tile, high_tile, p if BITS == 3 else p % LOW_PARTS, BITS)
            group = 0
            if GROUP_PARTS > 0:
                group = min(part // GROUP_PARTS, groups - 1)
            zero = row_zero
            if ZEROS == "integer" and GROUP_PARTS > 0:
                zero = tl.load(zeros + group * n + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
            if INPUTS != "float":
                ws = int8s(codes, BITS)
            elif TABLE:
                ws = looked_up(codes, table, x.dtype.element_ty)
            else:
                ws = floats(codes, zero, BITS, x.dtype.element_ty)
            if GROUP_PARTS == 0:
                if INPUTS == "float":
                    sums = tl.dot(ws, xs, sums, input_precision="ieee")
                else:
                    sums = tl.dot(ws, xs, sums, out_dtype=tl.int32)
            else:
                scale = tl.load(scales + group * n + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
                if INPUTS == "float":
                    sums += scale * tl.dot(ws, xs, input_precision="ieee")
                else:
                    if INPUTS == "group":
                        scale = scale * tl.load(x_scales + batch * groups + group, mask=batch_ok, other=0.0)[None, :]
                    sums += scale * tl.dot(ws, xs, out_dtype=tl.int32).to(tl.float32)
            if ZEROS == "real" or (ZEROS == "integer" and INPUTS != "float"):
                total = tl.sum(xs.to(tl.float32 if INPUTS == "float" else tl.int32), axis=0).to(tl.float32)[None, :]
                if GROUP_PARTS == 0:
                    shifts += total
                else:
                    shift = tl.load(zeros + group * n + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
                    shifts += scale * shift * total
    out = sums.to(tl.float32)
    if GROUP_PARTS == 0:
        if ZEROS == "real" or (ZEROS == "integer" and INPUTS != "float"):
            out -= shifts * tl.load(zeros + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        out *= tl.load(scales + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    else:
        out -= shifts
    if INPUTS == "token":
        out *= tl.load(x_scales + batch, mask=batch_ok, other=0.0)[None, :]
    y += tl.program_id(2).to(tl.int64) * m * n
    places = batch.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(y + places, out.to(y.dtype.element_ty), mask=row_ok[:, None] & batch_ok[None, :])


@triton.jit
def add_up(partial, y, size, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y `[size]` = the sum over the first axis of `partial` float32 `[SPLIT, size]`, first to last."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        total += tl.load(partial + split * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)

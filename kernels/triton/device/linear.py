"""y = x W^T by matrix instructions, with the weight as the left operand: its bytes become operands in registers.

    y[m, n] = sum over groups g of scale[n, g] * (sum over k in g of (code[n, k] - zero[n, g]) * x[m, k])

The terms of the inner sum are exact small integers (or entries of the codebook): scales are applied to sums, in float32.
Integer zeros are subtracted when the operand is made, real ones are taken out of the sum as `zero * sum of x`. With int8 inputs
the inner sum is one of integers, and `x_scale[m, g]` (`x_scale[m]` per token) is applied together with the weight's scale.

Few rows of x give few programs: `SPLIT` programs share the columns of one tile, each writes its part of the sum to a
workspace, and `add_up` adds the parts in order. Results are the same bits in every run.
"""

import triton
import triton.language as tl

from .weight import (
    as_int8,
    from_codebook,
    load_group,
    load_high,
    load_low,
    part_codes,
    plane_pointers,
    subtract_zero,
)


@triton.jit
def linear(
    x,  # [m, width] float, or int8 with padded groups
    x_scales,  # float32 [m, groups] or [m]; not read for float inputs
    weight,  # WeightArgs
    y,  # [m, rows], or float32 [SPLIT, m, rows]
    m,
    width,
    FORMAT: tl.constexpr,
    INPUTS: tl.constexpr,  # "float", "group" (of several groups), "token"
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    share = tl.cdiv(weight.slabs, SPLIT)
    first = tl.program_id(2) * share
    WIDTH: tl.constexpr = FORMAT.width
    PARTS: tl.constexpr = FORMAT.parts
    column = tl.arange(0, WIDTH)
    row_ok, batch_ok = rows < weight.rows, batch < m
    low, high = plane_pointers(weight, rows, FORMAT)
    x += batch.to(tl.int64)[None, :] * width + column[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INPUTS == "token" and FORMAT.group_parts == 0 else tl.float32)
    shifts = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    row_zero = 0.0
    if FORMAT.zeros == "integer" and FORMAT.group_parts == 0:
        row_zero = load_group(weight.zeros, 0, weight, rows, row_ok)
    for slab in range(first, min(first + share, weight.slabs)):
        low_bytes = tl.zeros((BLOCK_N, WIDTH), tl.uint8)
        high_bytes = load_high(high, low_bytes, slab, row_ok, FORMAT, "evict_first")
        for p in tl.static_range(PARTS):
            low_bytes = load_low(low, low_bytes, slab, p, row_ok, FORMAT, "evict_first")
            part = slab * PARTS + p
            inside = (part * WIDTH + column < width)[:, None] & batch_ok[None, :]
            xs = tl.load(x + part * WIDTH, mask=inside, other=0.0)
            codes = part_codes(low_bytes, high_bytes, p, FORMAT)
            group = 0
            if FORMAT.group_parts > 0:
                group = min(part // FORMAT.group_parts, weight.groups - 1)
            zero = row_zero
            if FORMAT.zeros == "integer" and FORMAT.group_parts > 0:
                zero = load_group(weight.zeros, group, weight, rows, row_ok)
            if INPUTS != "float":
                ws = as_int8(codes, FORMAT.bits)
            elif FORMAT.codebook:
                ws = from_codebook(codes, weight.codebook, x.dtype.element_ty)
            else:
                ws = subtract_zero(codes, zero, FORMAT.bits, x.dtype.element_ty)
            if FORMAT.group_parts == 0:
                if INPUTS == "float":
                    sums = tl.dot(ws, xs, sums, input_precision="ieee")
                else:
                    sums = tl.dot(ws, xs, sums, out_dtype=tl.int32)
            else:
                scale = load_group(weight.scales, group, weight, rows, row_ok)
                if INPUTS == "float":
                    sums += scale * tl.dot(ws, xs, input_precision="ieee")
                else:
                    if INPUTS == "group":
                        scale = (
                            scale * tl.load(x_scales + batch * weight.groups + group, mask=batch_ok, other=0.0)[None, :]
                        )
                    sums += scale * tl.dot(ws, xs, out_dtype=tl.int32).to(tl.float32)
            if FORMAT.zeros == "real" or (FORMAT.zeros == "integer" and INPUTS != "float"):
                total = tl.sum(xs.to(tl.float32 if INPUTS == "float" else tl.int32), axis=0).to(tl.float32)[None, :]
                if FORMAT.group_parts == 0:
                    shifts += total
                else:
                    shift = load_group(weight.zeros, group, weight, rows, row_ok)
                    shifts += scale * shift * total
    out = sums.to(tl.float32)
    if FORMAT.group_parts == 0:
        if FORMAT.zeros == "real" or (FORMAT.zeros == "integer" and INPUTS != "float"):
            out -= shifts * load_group(weight.zeros, 0, weight, rows, row_ok)
        out *= load_group(weight.scales, 0, weight, rows, row_ok)
    else:
        out -= shifts
    if INPUTS == "token":
        out *= tl.load(x_scales + batch, mask=batch_ok, other=0.0)[None, :]
    y += tl.program_id(2).to(tl.int64) * m * weight.rows
    places = batch.to(tl.int64)[None, :] * weight.rows + rows[:, None]
    tl.store(y + places, out.to(y.dtype.element_ty), mask=row_ok[:, None] & batch_ok[None, :])


@triton.jit
def add_up(partial, y, size, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y `[size]` = the sum over the first axis of `partial` float32 `[SPLIT, size]`, first to last."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        total += tl.load(partial + split * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)

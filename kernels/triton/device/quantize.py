"""Quantize inputs to int8 codes in one pass, with a scale per row, or per row and group of the weight's columns."""

import triton
import triton.language as tl


@triton.jit
def quantize(x, codes, scales, width, span, padded_span, spans, padded, steps, BLOCK: tl.constexpr):
    """codes int8 `[m, padded]`, scales float32 `[m, spans]` of `x` `[m, width]`, in spans of `span` columns.

    `scale = absmax / steps`, 1 if all are zero; codes are rounded half to even and clamped to -128 .. 127. A span takes
    `padded_span` columns of `codes`; the padding is 0.
    """
    row, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = index * span
    count = min(span, width - start)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    x += row * width + start
    for at in range(0, count, BLOCK):
        largest = tl.maximum(
            largest, tl.abs(tl.load(x + at + column, mask=at + column < count, other=0.0).to(tl.float32))
        )
    absmax = tl.max(largest, axis=0)
    scale = tl.where(absmax == 0, 1.0, tl.div_rn(absmax, steps))
    codes += row * padded + index * padded_span
    room = min(padded_span, padded - index * padded_span)
    for at in range(0, room, BLOCK):
        values = tl.load(x + at + column, mask=at + column < count, other=0.0).to(tl.float32)
        # Adding and subtracting 1.5 * 2**23 leaves the nearest integer, ties to even.
        nearest = tl.div_rn(values, tl.zeros_like(values) + scale) + 12582912.0 - 12582912.0
        clamped = tl.minimum(tl.maximum(nearest, -128.0), 127.0)
        tl.store(codes + at + column, clamped.to(tl.int8), mask=at + column < room)
    tl.store(scales + row * spans + index, scale)

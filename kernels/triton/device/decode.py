"""From bytes to operands, inside a kernel.

A float whose exponent makes one unit of its last place equal to 1 takes a code into its mantissa: 1024 + code in float16,
128 + code in bfloat16 (codes below 128), 2**23 + code in float32. Subtracting that number plus the zero leaves `code - zero`
exactly, with no conversion of integers, which GPUs do at a fraction of their speed. 8-bit codes are stored signed: the
exclusive or that puts the exponent in also turns their sign bit back.
"""

import triton
import triton.language as tl


@triton.jit
def part_codes(low_bytes, high_bytes, part: tl.constexpr, BITS: tl.constexpr):
    """Codes of part `part` of a slab, uint8; 8-bit ones as they are stored."""
    if BITS == 8:
        codes = low_bytes
    elif BITS == 4:
        codes = low_bytes >> (4 * part) & 15
    elif BITS == 2:
        codes = low_bytes >> (2 * part) & 3
    else:
        codes = (low_bytes >> (2 * (part % 4)) & 3) | (high_bytes >> part & 1) << 2
    return codes


@triton.jit
def floats(codes, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
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
def looked_up(codes, table, DTYPE: tl.constexpr):
    """The values of a codebook."""
    return tl.load(table + codes.to(tl.int32)).to(DTYPE)


@triton.jit
def int8s(codes, BITS: tl.constexpr):
    """`code - center` as int8; what 8 bits store is that already."""
    if BITS == 8:
        values = codes.to(tl.int8, bitcast=True)
    else:
        values = codes.to(tl.int8, bitcast=True) - 2 ** (BITS - 1)
    return values

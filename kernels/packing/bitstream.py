"""Little-endian bit streams: element k of a row occupies the bits `bits*k .. bits*k + bits - 1` of its 32-bit words.

Eight codes of `bits` bits are `bits` bytes. They are joined in wider and wider integers: two of 8 bits in one of 16, two of
those in one of 32, two of those in one of 64.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import CompressError

RUN = 8  # codes that fill whole bytes
CACHED = 2**19  # codes at a time: intermediate results stay in the CPU's cache, which is three times as fast
STAGES = ((torch.int16, 8), (torch.int32, 16), (torch.int64, 32))  # the integer, and the bits of each half


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 `codes` `[rows, n]`, each below `2**bits`, into int32 `[rows, ceil(n * bits / 32)]`."""
    return torch.cat([_packed(piece, bits) for piece in codes.split(_rows_at_once(codes.shape[1]))])


def unpack_rows(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 `[rows, n]`. Raises `CompressError` if a row of `packed` has fewer than `n` codes."""
    if not 0 <= n * bits <= 32 * packed.shape[1]:
        raise CompressError(
            f"{packed.shape[1]} words do not hold {n} codes of {bits} bits", "the checkpoint is damaged"
        )
    return torch.cat([_unpacked(piece, bits, n) for piece in packed.split(_rows_at_once(n))])


def _packed(codes: Tensor, bits: int) -> Tensor:
    rows, n = codes.shape
    words = math.ceil(n * bits / 32)
    whole = _padded(codes, -n % RUN).flatten()  # flattened, because the strides of a single row are arbitrary
    for stage, (dtype, half) in enumerate(STAGES if bits < 8 else ()):
        filled = bits << stage
        low = (1 << filled) - 1
        pairs = whole.view(dtype)
        whole = (pairs >> (half - filled)).bitwise_and_(low << filled).bitwise_or_(pairs & low)
    stream = whole.view(torch.uint8).view(rows, -1, RUN)[..., :bits].flatten(1)
    return _padded(stream, 4 * words - stream.shape[1]).flatten().view(torch.int32).view(rows, words)


def _unpacked(packed: Tensor, bits: int, n: int) -> Tensor:
    rows, runs = packed.shape[0], math.ceil(n / RUN)
    stream = packed.flatten().view(torch.uint8).view(rows, -1)
    stream = _padded(stream, runs * bits - stream.shape[1]).reshape(rows, runs, bits)
    whole = _padded(stream, RUN - bits).flatten()
    for stage, (dtype, half) in reversed(list(enumerate(STAGES if bits < 8 else ()))):
        filled = bits << stage
        low = (1 << filled) - 1
        pairs = whole.view(dtype)
        whole = (pairs << (half - filled)).bitwise_and_(low << half).bitwise_or_(pairs & low)
    return whole.view(torch.uint8).view(rows, -1)[:, :n].contiguous()


def _rows_at_once(columns: int) -> int:
    return max(1, CACHED // max(1, columns))


def _padded(values: Tensor, count: int) -> Tensor:
    """`values` with `count` zeros appended to every row, or `-count` columns removed; not a copy if `count` is 0."""
    return pad(values, (0, count)) if count else values

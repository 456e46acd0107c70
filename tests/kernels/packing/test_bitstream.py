"""Bit streams against Python's own big integers."""

import pytest
import torch
from torch import Tensor

from lmpress.kernels.packing.bitstream import CACHED, pack_rows, unpack_rows

BITS = range(2, 9)
LENGTHS = [1, 2, 3, 7, 10, 11, 16, 31, 32, 33, 43, 64, 97, 172]


def codes(bits: int, rows: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(97 * bits + n)
    return torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)


def as_words(row: list[int], bits: int) -> list[int]:
    """The row as one big integer, element k at bit `bits * k`, cut into little-endian signed 32-bit words."""
    number = sum(code << (bits * k) for k, code in enumerate(row))
    raw = number.to_bytes(-(-len(row) * bits // 32) * 4, "little")
    return [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_one_big_integer_and_comes_back(bits: int, n: int) -> None:
    given = codes(bits, 3, n)
    packed = pack_rows(given, bits)
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert packed.tolist() == [as_words(row, bits) for row in given.tolist()]
    back = unpack_rows(packed, bits, n)
    assert back.dtype == torch.uint8 and torch.equal(back, given)


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_codes_fill_every_bit(bits: int) -> None:
    full = torch.full((2, 32), 2**bits - 1, dtype=torch.uint8)
    packed = pack_rows(full, bits)
    assert (packed == -1).all()
    assert torch.equal(unpack_rows(packed, bits, 32), full)


@pytest.mark.parametrize("bits", BITS)
def test_the_unused_end_of_the_last_word_is_zero_and_is_ignored_when_read(bits: int) -> None:
    given = codes(bits, 2, 5)
    packed = pack_rows(given, bits)
    used = 5 * bits - 32 * (packed.shape[1] - 1)
    assert ((packed[:, -1].long() & 0xFFFFFFFF) >> used == 0).all()
    packed[:, -1] |= torch.tensor(-1 << used).to(torch.int32)
    assert torch.equal(unpack_rows(packed, bits, 5), given)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_that_are_packed_in_pieces_are_packed_as_one_by_one(bits: int) -> None:
    codes = torch.randint(
        0, 2**bits, (5, CACHED // 2 - 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    packed = pack_rows(codes, bits)
    assert torch.equal(packed, torch.cat([pack_rows(row, bits) for row in codes.split(1)]))
    assert torch.equal(unpack_rows(packed, bits, codes.shape[1]), codes)

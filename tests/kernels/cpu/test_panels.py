"""The panel layout: the position of every code and scale, and exact unpacking."""

from dataclasses import replace

import pytest
import torch

from lmpress.kernels.cpu.layout import pack, padded_columns, stored_bits, unpack
from lmpress.kernels.weight import Weight


def weight(rows: int, columns: int, bits: int, group: int) -> Weight:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Weight(codes, torch.rand(rows, -(-columns // group)), None, bits, group)


def test_the_panel_layout_is_the_drawing_in_the_c_file() -> None:
    """4 bits: lane r, byte j of a block's vector holds the columns 4q + j of row r, quad q in the bits 4q .."""
    given = weight(8, 16, 4, 16)
    vectors = pack(given, 4).packed.view(2, 2, 4, 4)  # panels, blocks, lanes, bytes
    for row in range(8):
        for column in range(16):
            block, within = divmod(column, 8)
            byte = vectors[row // 4, block, row % 4, within % 4]
            assert byte >> (4 * (within // 4)) & 15 == given.codes[row, column]


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("columns", "group"), [(64, 64), (172, 43), (100, 32), (96, 16), (7, 7), (40, 8), (33, 100)])
def test_packed_codes_are_unpacked_exactly(lanes: int, bits: int, columns: int, group: int) -> None:
    given = weight(21, columns, bits, group)
    panels = pack(given, lanes)
    assert torch.equal(unpack(panels.packed, lanes, 21, columns, group, panels.bits), given.codes)


def test_scales_lie_by_lane_and_missing_rows_are_zero() -> None:
    given = weight(5, 64, 4, 32)
    scales = pack(given, 4).scales
    assert scales.shape == (2, 2, 4)
    for row in range(8):
        expected = given.scale[row] if row < 5 else torch.zeros(2)
        assert torch.equal(scales[row // 4, :, row % 4], expected)


@pytest.mark.parametrize(
    ("bits", "columns", "group", "stored"),
    [(4, 4096, 128, 4), (3, 4096, 128, 3), (3, 4096, 16, 4), (2, 4096, 8, 4), (5, 4096, 128, 8), (3, 172, 43, 4)],
)
def test_codes_are_stored_in_the_least_memory(bits: int, columns: int, group: int, stored: int) -> None:
    assert stored_bits(bits, columns, group) == stored


@pytest.mark.parametrize(
    ("columns", "group", "bits", "padded"), [(128, 32, 4, 128), (172, 43, 4, 192), (100, 32, 4, 104), (20, 64, 3, 32)]
)
def test_groups_are_filled_up_to_blocks(columns: int, group: int, bits: int, padded: int) -> None:
    assert padded_columns(columns, group, bits) == padded


@pytest.mark.parametrize("factor", [1, 1 + 2**-20, 2**20], ids=["exact", "finer", "larger"])
def test_scales_take_half_the_memory_if_no_bit_is_lost(factor: float) -> None:
    given = weight(5, 64, 4, 32)
    scale = (1 + given.scale).half().float() * factor
    zero = torch.randint(0, 16, scale.shape).float()
    panels = pack(replace(given, scale=scale, zero=zero), 4)
    assert panels.scales is not None and panels.offsets is not None
    assert panels.scales.dtype == panels.offsets.dtype == (torch.float16 if factor == 1 else torch.float32)
    for stored, expected in ((panels.scales, scale), (panels.offsets, zero - 8)):
        rows = stored.float().transpose(1, 2).reshape(-1, 2)
        assert torch.equal(rows[:5], expected)

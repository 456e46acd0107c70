"""Blocks of other tools are read as the gguf library reads them, and written back unchanged."""

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize

from lmpress.compress.formats.gguf import blocks
from lmpress.compress.formats.kinds import gguf_blocks
from lmpress.kernels.tensor import BlockTensor, CompressedTensor


def theirs(packed: torch.Tensor, block: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(packed.numpy(), gguf.GGMLQuantizationType[block]))


def random_blocks(block: blocks.Kind, rows: int = 3, count: int = 2) -> torch.Tensor:
    """Bytes at random with float16 fields that are finite: every code, scale and minimum occurs."""
    generator = torch.Generator().manual_seed(len(block))
    size = blocks.SIZES[block][1]
    packed = torch.randint(0, 256, (rows, count, size), dtype=torch.uint8, generator=generator)
    floats = {"Q4_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(block, (0,))
    for start in floats:
        values = torch.randn(rows, count, 1, generator=generator).half()
        packed[..., start : start + 2] = values.view(torch.uint8)
    return packed.flatten(1)


@pytest.mark.parametrize("block", blocks.BLOCKS)
def test_any_bytes_are_read_as_the_library_reads_them(block: blocks.Kind) -> None:
    packed = random_blocks(block)
    tensor = blocks.unpack(block, packed)
    assert torch.equal(tensor.dequantize(), theirs(packed, block))
    assert isinstance(tensor, CompressedTensor if block in blocks.MIDDLE else BlockTensor)
    again = blocks.pack("P", tensor)
    assert again.shape == packed.shape == gguf_blocks.spec("P", tensor.args, *tensor.shape)["P.weight_blocks"].shape
    assert torch.equal(theirs(again, block), theirs(packed, block))


@pytest.mark.parametrize("block", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_library_quantized_is_written_back_byte_by_byte(block: blocks.Kind) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    packed = torch.from_numpy(quantize(weight.numpy(), gguf.GGMLQuantizationType[block]))
    assert torch.equal(blocks.pack("P", blocks.unpack(block, packed)), packed)


@pytest.mark.parametrize("block", ["Q4_1", "Q4_K", "Q6_K"])
def test_scales_of_zero_are_read_as_nonzero_divisors(block: blocks.Kind) -> None:
    packed = random_blocks(block).unflatten(1, (-1, blocks.SIZES[block][1]))
    packed[0, 0, slice(208, 210) if block == "Q6_K" else slice(0, 2)] = 0
    if block == "Q4_K":
        packed[1, 1, 4], packed[1, 1, 12] = 64, 0  # the first scale, and the fifth but for two bits, which are 1
    if block == "Q6_K":
        packed[1, 1, 192] = 0
    tensor = blocks.unpack(block, packed.flatten(1))
    assert isinstance(tensor, BlockTensor)
    assert (tensor.scales() != 0).all()
    assert torch.equal(tensor.dequantize(), theirs(packed.flatten(1), block))

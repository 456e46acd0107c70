"""GPTQ and AWQ tensors, read word by word by the formats' published descriptions, and read back by lmpress."""

import pytest
import torch
from torch import Tensor

from lmpress.compress.formats.export import awq, gptq
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.errors import CompressError
from lmpress.kernels.tensor import CompressedTensor
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.scheme import QuantArgs

ROWS, COLUMNS = 64, 96


def layer(bits: int, symmetric: bool, group: int | None) -> CompressedTensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(bits))
    strategy = "channel" if group is None else "group"
    return round_to_nearest(weight, QuantArgs(bits=bits, symmetric=symmetric, strategy=strategy, group_size=group))


def stream(words: Tensor, bits: int, count: int) -> list[int]:
    """The first `count` codes of a little-endian bit stream, through one big integer."""
    number = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(number >> (bits * k)) & (2**bits - 1) for k in range(count)]


@pytest.mark.parametrize("offset", [1, 0], ids=["v1", "v2"])
@pytest.mark.parametrize("group", [32, None], ids=["g32", "channel"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_gptq_tensors_follow_the_published_format(bits: int, symmetric: bool, group: int | None, offset: int) -> None:
    tensor = layer(bits, symmetric, group)
    tensors = gptq.pack("P", tensor, offset=offset)
    codes = [stream(column, bits, COLUMNS) for column in tensors["P.qweight"].T]
    zeros = [stream(row, bits, ROWS) for row in tensors["P.qzeros"]]
    scales, groups = tensors["P.scales"].float(), tensors["P.g_idx"]
    served = torch.tensor(
        [
            [
                (codes[r][c] - ((zeros[groups[c]][r] + offset) & (2**bits - 1))) * float(scales[groups[c], r])
                for c in range(COLUMNS)
            ]
            for r in range(ROWS)
        ]
    )
    assert torch.equal(served, tensor.dequantize())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_awq_tensors_follow_the_published_format(symmetric: bool) -> None:
    tensor = layer(4, symmetric, 32)
    tensors = awq.pack("P", tensor)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def nibbles(words: Tensor) -> list[int]:
        values = [0] * ROWS
        for c, word in enumerate(words):
            for k in range(8):
                values[8 * c + order[k]] = (int(word) >> (4 * k)) & 15
        return values

    codes = torch.tensor([nibbles(row) for row in tensors["P.qweight"]])
    zeros = torch.tensor([nibbles(row) for row in tensors["P.qzeros"]]).repeat_interleave(32, 0)
    scales = tensors["P.scales"].float().repeat_interleave(32, 0)
    assert torch.equal(((codes - zeros) * scales).T, tensor.dequantize())


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("offset", [1, 0], ids=["v1", "v2"])
def test_gptq_is_read_back(bits: int, symmetric: bool, offset: int) -> None:
    tensor = layer(bits, symmetric, 32)
    back = gptq.unpack("P", gptq.pack("P", tensor, offset=offset), tensor.args, offset=offset)
    assert torch.equal(back.codes, tensor.codes) and torch.equal(back.scale, tensor.scale)
    assert (back.zero is None and tensor.zero is None) or torch.equal(back.zero, tensor.zero)


def test_awq_is_read_back() -> None:
    tensor = layer(4, False, 32)
    back = awq.unpack("P", awq.pack("P", tensor), tensor.args)
    assert torch.equal(back.codes, tensor.codes) and torch.equal(back.zero, tensor.zero)
    assert torch.equal(back.dequantize(), tensor.dequantize())


def test_act_order_is_refused() -> None:
    tensor = layer(4, True, 32)
    tensors = gptq.pack("P", tensor, offset=1)
    tensors["P.g_idx"] = tensors["P.g_idx"].flip(0)
    with pytest.raises(CompressError, match="P has groups scattered by act-order"):
        gptq.unpack("P", tensors, tensor.args, offset=1)


def test_symmetric_zeros_off_the_middle_are_refused() -> None:
    tensor = layer(4, True, 32)
    tensors = gptq.pack("P", tensor, offset=1)
    tensors["P.qzeros"][0, 0] += 1
    with pytest.raises(CompressError, match="P has zeros other than the middle code"):
        gptq.unpack("P", tensors, tensor.args, offset=1)


@pytest.mark.parametrize(
    ("changes", "shape", "reason"),
    [
        ({"bits": 5}, (64, 64), "2, 3, 4 or 8 bits"),
        ({"scale_dtype": "float32"}, (64, 64), "float16 scales"),
        ({}, (64, 172), "multiples of 32"),
        ({}, (172, 64), "multiples of 32"),
    ],
)
def test_grids_that_gptq_cannot_hold_are_refused_with_the_reason(
    changes: dict, shape: tuple[int, int], reason: str
) -> None:
    assert reason in gptq.supports(QuantArgs(**{"group_size": 32, **changes}), shape)
    assert gptq.supports(QuantArgs(group_size=32), (64, 64)) is None


def test_layers_that_differ_are_named() -> None:
    layers = {"model.layers.0.a": QuantArgs(group_size=32), "model.layers.0.b": QuantArgs(group_size=64)}
    with pytest.raises(CompressError, match=r"model.layers.0.a has 4 bits .* model.layers.0.b 4 bits"):
        gptq.config(layers, [], version="gptq")


def test_dense_layers_are_left_out_of_the_config() -> None:
    names = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("q", "k")]
    found = gptq.config(dict.fromkeys(names, QuantArgs()), ["model.layers.0.v", "lm_head"], version="gptq")
    assert found["modules_in_block_to_quantize"] == [["q", "k"]]
    with pytest.raises(CompressError, match=r"model.layers.1.q is dense"):
        gptq.config({names[0]: QuantArgs()}, ["model.layers.1.q"], version="gptq")


def test_dequantizing_keeps_the_device_of_the_codes() -> None:
    args = QuantArgs(group_size=32)
    codes, scale = (torch.empty(4, n, dtype=d, device="meta") for n, d in ((32, torch.uint8), (1, torch.float16)))
    assert CompressedTensor(codes, scale, None, args).dequantize().device.type == "meta"
    assert Grid.fit(torch.ones(4, 32), args).dequantize(torch.zeros(4, 32)).device.type == "cpu"

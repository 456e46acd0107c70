"""Values inside tensors that point beyond a weight: refused when they are unpacked, before a kernel follows them."""

from dataclasses import replace

import pytest
import torch

from lmpress.compress.formats.export import bitsandbytes
from lmpress.compress.formats.kinds import bilevel
from lmpress.compress.formats.kinds.outlier_columns import LLMInt8
from lmpress.errors import CompressError
from lmpress.kernels.packing.bitstream import pack_rows, unpack_rows
from lmpress.kernels.tensor import OutlierColumnsTensor
from lmpress.recipes.scheme import QuantArgs, inputs_per, signed_weights

WEIGHT = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("columns", [0, 32, 5], "weight_columns holds 32, expected numbers from 0 to 31"),
        ("counts", [4] + [0] * 15, "weight_counts adds up to 4, expected 3"),
        ("counts", [2] + [0] * 15, "weight_counts adds up to 2, expected 3"),
    ],
)
def test_residuals_outside_the_matrix(part: str, value: list[int], message: str) -> None:
    args = QuantArgs(4, False, "group", 16, formula="spqr", scale_dtype="bilevel")
    tensor = bilevel.round_to_nearest(WEIGHT, args)
    counts = torch.tensor([3] + [0] * 15)
    tensor = replace(tensor, counts=counts, columns=torch.tensor([0, 31, 5]), values=torch.ones(3).half())
    packed = bilevel.pack("x", tensor)
    assert bilevel.unpack("x", packed, tensor.args).columns.tolist() == [0, 31, 5]
    packed[f"x.weight_{part}"] = torch.tensor(value, dtype=torch.uint8)
    with pytest.raises(CompressError, match=message):
        bilevel.unpack("x", packed, tensor.args)


def test_outlier_columns_outside_the_matrix() -> None:
    args, inputs = signed_weights("channel", outliers=0.06), inputs_per("token", dynamic=True, threshold=6.0)
    layout = LLMInt8(inputs)
    codes, scale = torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 1).half()
    tensor = OutlierColumnsTensor(codes, scale, torch.tensor([3, 31]), torch.ones(16, 2).half(), args, inputs)
    packed = layout.pack("x", tensor)
    assert layout.unpack("x", packed, args).columns.tolist() == [3, 31]
    packed["x.weight_columns"] = torch.tensor([3, 32], dtype=torch.uint8)
    with pytest.raises(CompressError, match="weight_columns holds 32, expected numbers from 0 to 31"):
        layout.unpack("x", packed, args)


@pytest.mark.parametrize(
    "state",
    [
        b"[" * 50_000,
        b"{}",
        b'{"quant_type": "nf4", "shape": ["a", 32], "blocksize": 64, "dtype": "float32"}',
        b'{"quant_type": "nf4", "shape": [-1, -1], "blocksize": 64, "dtype": "float32"}',
        b'{"quant_type": "nf4", "shape": [16, 32], "blocksize": 64, "dtype": 3}',
        b'{"quant_type": "nf4", "shape": [16, 32], "blocksize": 64, "dtype": "nn"}',
        b'{"quant_type": "nf4", "shape": [16, 32], "blocksize": 64, "dtype": "float32", "nested_offset": []}',
        b'{"quant_type": "nf4", "shape": [16, 320], "blocksize": 64, "dtype": "float32"}',
    ],
)
def test_the_json_of_bitsandbytes_is_checked(state: bytes) -> None:
    tensors = {"x.weight": torch.zeros(256, 1, dtype=torch.uint8)}
    tensors[f"x.weight.{bitsandbytes.STATE}"] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(CompressError, match=r"is not readable|describes another weight"):
        bitsandbytes.unpack(
            "x", tensors, QuantArgs(strategy="flat", group_size=64, formula="nf4", scale_dtype="float32")
        )


def test_more_codes_than_words_hold_are_refused() -> None:
    packed = pack_rows(torch.ones(2, 10, dtype=torch.uint8), 4)
    assert unpack_rows(packed, 4, 10).tolist() == [[1] * 10] * 2
    for count in (17, 10**18, -1):
        with pytest.raises(CompressError, match="2 words do not hold"):
            unpack_rows(packed, 4, count)

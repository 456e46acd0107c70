"""Indices that a checkpoint states are checked when they are read: damaged ones are named, and reach no kernel."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lmpress.compress.formats.export import bitsandbytes, gptq
from lmpress.compress.formats.kinds import bilevel, outlier_columns, pruned
from lmpress.errors import CompressError
from lmpress.kernels.tensor import NF4Tensor, OutlierColumnsTensor, PrunedTensor, SpQRTensor
from lmpress.kernels.tensor.grid import Grid
from lmpress.kernels.tensor.integer import CompressedTensor
from lmpress.recipes.scheme import PruneArgs, QuantArgs, inputs_per, signed_weights

ROWS, COLUMNS = 32, 64
WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
Damage = Callable[[dict[str, Tensor]], None]


def put(part: str, value: int, place: int = 0) -> Damage:
    """Writes `value` into the tensor `part`."""

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"x.{part}"].view(-1)[place] = value

    return damage


def spqr() -> SpQRTensor:
    args = QuantArgs(3, False, group_size=16, formula="spqr", scale_dtype="bilevel")
    dense = bilevel.round_to_nearest(WEIGHT, args)
    counts = torch.full((ROWS,), 2)
    columns = torch.tensor([3, COLUMNS - 1]).repeat(ROWS)
    return SpQRTensor(dense.codes, dense.scale, dense.zero, counts, columns, torch.ones(2 * ROWS).half(), args)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            put("weight_columns", COLUMNS),
            r"x\.weight_columns holds 64, expected numbers from 0 to 63; the checkpoint is",
        ),
        (put("weight_columns", 255), r"x\.weight_columns holds 255"),
        (put("weight_counts", 200), r"x\.weight_counts holds 200, expected numbers from 0 to 64"),
        (put("weight_counts", 3), r"x\.weight_counts adds up to 65, expected 64"),
        (put("weight_shape", 10**12, 1), r"x\.weight_shape is \(32, 1000000000000\)"),
        (put("weight_shape", 33), r"x\.weight_shape is \(33, 64\), and the layer's other tensors make \(32, 64\)"),
    ],
)
def test_spqr(damage: Damage, message: str) -> None:
    tensor = spqr()
    tensors = bilevel.pack("x", tensor)
    assert torch.equal(bilevel.unpack("x", tensors, tensor.args).dequantize(), tensor.dequantize())
    damage(tensors)
    with pytest.raises(CompressError, match=message):
        bilevel.unpack("x", tensors, tensor.args)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("weight_columns", COLUMNS, 2), r"x\.weight_columns holds 64, expected numbers from 0 to 63"),
        (put("weight_columns", 5), r"x\.weight_columns holds numbers that do not ascend"),
    ],
)
def test_outlier_columns(damage: Damage, message: str) -> None:
    args, columns = signed_weights("channel", outliers=0.04, scale_dtype="float32"), torch.tensor([1, 5, 63])
    layout = outlier_columns.LLMInt8(inputs_per("token", dynamic=True, threshold=6.0))
    assert layout.inputs is not None
    codes, kept = torch.full((ROWS, COLUMNS), 7, dtype=torch.uint8), WEIGHT[:, columns].half()
    tensor = OutlierColumnsTensor(codes, torch.ones(ROWS, 1), columns, kept, args, layout.inputs)
    tensors = layout.pack("x", tensor)
    assert torch.equal(layout.unpack("x", tensors, args).columns, columns)
    damage(tensors)
    with pytest.raises(CompressError, match=message):
        layout.unpack("x", tensors, args)


@pytest.mark.parametrize(
    ("args", "damage", "message"),
    [
        (PruneArgs(0.5, storage="bitmask"), put("weight_shape", 10**9), r"x\.weight_shape is \(1000000000, 64\)"),
        (PruneArgs(0.5, storage="bitmask"), put("weight_shape", 65, 1), r"is \(32, 65\), weight_bitmask is \(32, 8\)"),
        (PruneArgs(pattern="2:4", storage="2:4"), put("weight_shape", -1), r"x\.weight_shape is \(-1, 64\)"),
        (PruneArgs(pattern="2:4", storage="2:4"), put("weight_places", 0xFF), r"x\.weight_places stores a column of"),
    ],
)
def test_pruned(args: PruneArgs, damage: Damage, message: str) -> None:
    args = args.for_layer(COLUMNS, torch.float32, "layer")
    mask = torch.tensor([True, False]).repeat(ROWS, COLUMNS // 2)
    tensors = pruned.pack("x", PrunedTensor.of(WEIGHT, mask, args))
    pruned.unpack("x", tensors, args)
    damage(tensors)
    with pytest.raises(CompressError, match=message):
        pruned.unpack("x", tensors, args)


@pytest.mark.parametrize("group", [2, -1, 2**31 - 1])
def test_groups_of_gptq(group: int) -> None:
    args = QuantArgs(4, group_size=32)
    grid = Grid.fit(WEIGHT, args)
    tensors = gptq.pack("x", CompressedTensor.from_grid(grid.quantize(WEIGHT), grid), offset=1)
    put("g_idx", group, 7)(tensors)
    with pytest.raises(CompressError, match=rf"x\.g_idx holds {group}, expected numbers from 0 to 1"):
        gptq.unpack("x", tensors, args, offset=1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"[32, 64]", b"[-2,-64]", "describes another weight"),
        (b"[32, 64]", b"[32, 62]", "describes another weight"),
        (b"[32, 64]", b"[3.5,64]", "is not readable"),
        (b"float32", b"float77", "is not readable .dtype 'float77'"),
        (b"nested_offset", b"mested_offset", "is not readable .'nested_offset'"),
    ],
)
def test_the_state_of_nf4(old: bytes, new: bytes, message: str) -> None:
    args = QuantArgs(strategy="flat", group_size=64, formula="nf4", scale_dtype="nested")
    tensors = bitsandbytes.pack("x", NF4Tensor.of(WEIGHT, args))
    read, name = partial(bitsandbytes.unpack, "x", args=args), f"x.weight.{bitsandbytes.STATE}"
    read(tensors)
    state = bytes(tensors[name].tolist())
    assert old in state
    tensors[name] = torch.tensor(list(state.replace(old, new, 1)), dtype=torch.uint8)
    with pytest.raises(CompressError, match=rf"x\.weight\.quant_state\S* {message}"):
        read(tensors)


def test_columns_of_bitsandbytes_that_are_not_row_after_row() -> None:
    args = signed_weights("channel", scale_dtype="float32")
    grid = Grid.fit(WEIGHT, args)
    tensors = bitsandbytes.pack("x", CompressedTensor.from_grid(grid.quantize(WEIGHT), grid))
    bitsandbytes.unpack("x", tensors, args)
    put("weight_format", 1)(tensors)
    with pytest.raises(CompressError, match=r"x\.weight_format is not 0"):
        bitsandbytes.unpack("x", tensors, args)

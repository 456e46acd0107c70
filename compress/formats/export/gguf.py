"""GGUF blocks: 32 neighbouring columns of a row with one float16 scale, repacked from our codes bit for bit.

Q4_0  d, 16 bytes of nibbles                   w = d (c - 8)    byte j holds code j low and code j + 16 high
Q5_0  d, 32 high bits, 16 bytes of nibbles     w = d (c - 16)   bit j of the high bits is the fifth bit of code j
Q8_0  d, 32 signed bytes                       w = d c
Q4_1, Q5_1  d, m, the same codes               w = d c + m      m = float16(-zero d): here, and only here, a rounding
"""

from typing import Literal

import torch
from torch import Tensor

from ...scheme import PruneArgs, WeightArgs
from ...tensor import Compressed, CompressedTensor
from .layout import cast

Kind = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16"]
BLOCK = 32
# What a code of 0 .. 2**bits - 1 stands for in a symmetric block: the middle.
MIDDLE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}


def kind(args: WeightArgs, width: int) -> Kind:
    """The block that holds a row of `width` columns; F16 (its numbers, rounded) where none does."""
    if isinstance(args, PruneArgs):
        return "F16"
    group = args.columns_per_scale(width)
    if args.scale_dtype != "float16" or group % BLOCK:
        return "F16"
    if args.bits <= 4:
        return "Q4_0" if args.symmetric else "Q4_1"
    if args.bits == 5:
        return "Q5_0" if args.symmetric else "Q5_1"
    return "Q8_0" if args.symmetric else "F16"


def rounding(block: Kind) -> str | None:
    """What the block loses against the exact numbers, in words; None where it loses nothing."""
    if block == "F16":
        return "no GGUF block has this grid: written as float16 numbers, rounded"
    return "each group's minimum is rounded to float16" if block in ("Q4_1", "Q5_1") else None


def pack(name: str, tensor: Compressed) -> Tensor:
    """The layer `name` as bytes: uint8 `[out, bytes of a row]`, of the blocks that `kind` says."""
    block = kind(tensor.args, tensor.shape[1]) if isinstance(tensor, CompressedTensor) else "F16"
    if block == "F16":
        return _as_bytes(cast(name, tensor.dequantize(), torch.float16))
    assert isinstance(tensor, CompressedTensor)
    blocks = tensor.codes.unflatten(1, (-1, BLOCK))
    scale = tensor.scale.repeat_interleave(blocks.shape[1] // tensor.scale.shape[1], dim=1).unsqueeze(-1)
    parts = [_as_bytes(scale)]
    if block in MIDDLE:
        codes = blocks.to(torch.int16) + (MIDDLE[block] - 2 ** (tensor.args.bits - 1))
    else:
        assert tensor.zero is not None
        codes = blocks
        zero = tensor.zero.repeat_interleave(blocks.shape[1] // tensor.zero.shape[1], dim=1).unsqueeze(-1)
        parts.append(_as_bytes(cast(name, -zero.float() * scale.float(), torch.float16)))
    if block == "Q8_0":
        parts.append(_as_bytes(codes.to(torch.int8)))
    else:
        codes = codes.to(torch.uint8)
        if block in ("Q5_0", "Q5_1"):
            powers = 2 ** torch.arange(8, dtype=torch.uint8)
            parts.append(((codes >> 4).unflatten(2, (4, 8)) * powers).sum(-1, dtype=torch.uint8))
        low = codes & 15
        parts.append(low[..., :16] | low[..., 16:] << 4)
    return torch.cat(parts, dim=2).flatten(1)


def bytes_per_row(block: Kind, width: int) -> int:
    """The size of a row of `width` columns."""
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "F16": 2 * BLOCK}
    return width * sizes[block] // BLOCK


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)

"""GGUF's blocks: neighbouring columns of a row with their scales, to and from our codes bit for bit.

32 columns with float16 d (and m):
Q4_0  d, 16 bytes of nibbles                   w = d (c - 8)    byte j holds code j low and code j + 16 high
Q5_0  d, 32 high bits, 16 bytes of nibbles     w = d (c - 16)   bit j of the high bits is the fifth bit of code j
Q8_0  d, 32 signed bytes                       w = d c
Q4_1, Q5_1  d, m, the same codes               w = d c + m      m = float16(-zero d) for integer zeros: the only rounding

256 columns with float16 d (and m):
Q4_K  d, m, 8 scales s and minima t of 6 bits (`_pack_six`), nibbles     w = d s c - m t     in groups of 32
      each 32 bytes of nibbles hold a group low and the next one high
Q6_K  nibbles, pairs of high bits, 16 signed bytes s, d                  w = d s (c - 32)    in groups of 16
      of 128 codes, 64 bytes hold the first 64 low and the others high, 32 bytes hold bits 4 and 5 of all in runs of 32
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from ....kernels.tensor import BlockTensor, Compressed, CompressedTensor
from ....recipes.scheme import SUPER_BLOCK, PruneArgs, QuantArgs, WeightArgs
from ..export.layout import cast

Kind = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "F16"]
BLOCKS: tuple[Kind, ...] = get_args(Kind)[:-1]
BLOCK = 32
# What a code of 0 .. 2**bits - 1 stands for in a symmetric block: the middle.
MIDDLE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
SIZES: dict[Kind, tuple[int, int]] = {  # columns, bytes
    "Q4_0": (BLOCK, 18),
    "Q4_1": (BLOCK, 20),
    "Q5_0": (BLOCK, 22),
    "Q5_1": (BLOCK, 24),
    "Q8_0": (BLOCK, 34),
    "Q4_K": (SUPER_BLOCK, 144),
    "Q6_K": (SUPER_BLOCK, 210),
    "F16": (1, 2),
}


def kind(args: WeightArgs, width: int) -> Kind:
    """The block that holds a row of `width` columns; F16 (its numbers, rounded) where none does."""
    if isinstance(args, PruneArgs) or args.kind not in ("grid", "gguf_blocks"):
        return "F16"
    if args.kind == "gguf_blocks":
        return next(block for block in BLOCKS if block == args.block)
    group = args.columns_per_scale(width)
    if args.scale_dtype != "float16" or group % BLOCK or args.formula == "spqr":
        return "F16"
    if args.bits <= 4:
        return "Q4_0" if args.symmetric else "Q4_1"
    if args.bits == 5:
        return "Q5_0" if args.symmetric else "Q5_1"
    return "Q8_0" if args.symmetric else "F16"


def arguments(block: Kind) -> QuantArgs:
    """How a weight stored in blocks of codes is quantized: a plain grid of ours if there is one."""
    if block == "Q4_K":
        return QuantArgs(4, False, group_size=32, formula="ggml", scale_dtype="super")
    if block == "Q6_K":
        return QuantArgs(6, True, group_size=16, formula="ggml", scale_dtype="super")
    formula = "gptq" if block in MIDDLE else "ggml"
    return QuantArgs(BITS[block], block in MIDDLE, group_size=BLOCK, formula=formula)


def rounding(block: Kind, args: WeightArgs) -> str | None:
    """What the block loses against the exact numbers, in words; None if it loses nothing."""
    if block == "F16":
        return "no GGUF block has this grid: written as float16 numbers, rounded"
    integer_zeros = isinstance(args, QuantArgs) and args.kind == "grid"
    return "each group's minimum is rounded to float16" if block in ("Q4_1", "Q5_1") and integer_zeros else None


def bytes_per_row(block: Kind, width: int) -> int:
    """The size of a row of `width` columns."""
    columns, size = SIZES[block]
    return width // columns * size


def pack(name: str, tensor: Compressed) -> Tensor:
    """The layer `name` as bytes: uint8 `[out, bytes of a row]`, in blocks of `kind`."""
    block = kind(tensor.args, tensor.shape[1])
    if block == "F16":
        return _as_bytes(cast(name, tensor.dequantize(), torch.float16))
    assert isinstance(tensor, CompressedTensor | BlockTensor)
    if isinstance(tensor, BlockTensor) and tensor.factors is not None:
        return (_pack_q4_k if block == "Q4_K" else _pack_q6_k)(tensor).flatten(1)
    codes = tensor.codes.unflatten(1, (-1, BLOCK))
    if isinstance(tensor, BlockTensor):
        assert tensor.least is not None
        floats = [tensor.unit.unsqueeze(-1), -tensor.least.unsqueeze(-1)]
    else:
        spread = codes.shape[1] // tensor.scale.shape[1]
        floats = [tensor.scale.repeat_interleave(spread, dim=1).unsqueeze(-1)]
        if tensor.zero is not None:
            zero = tensor.zero.repeat_interleave(spread, dim=1).unsqueeze(-1)
            floats.append(cast(name, -zero.float() * floats[0].float(), torch.float16))
    if block in MIDDLE:
        codes = codes.to(torch.int16) + (MIDDLE[block] - 2 ** (tensor.args.bits - 1))
    return torch.cat([*(_as_bytes(each) for each in floats), *_pack_codes(codes, block)], dim=2).flatten(1)


def unpack(block: Kind, packed: Tensor) -> CompressedTensor | BlockTensor:
    """The weight in uint8 `[out, bytes of a row]`: the inverse of `pack`, and of what others wrote.

    If a scale is 0, all codes mean the same: they become 0, and the scale something that is not.
    """
    args = arguments(block)
    fields = packed.unflatten(1, (-1, SIZES[block][1]))
    if block in ("Q4_K", "Q6_K"):
        return (_unpack_q4_k if block == "Q4_K" else _unpack_q6_k)(fields, args)
    symmetric = block in MIDDLE
    floats, rest = fields.split([2 if symmetric else 4, SIZES[block][1] - (2 if symmetric else 4)], dim=2)
    codes, numbers = _unpack_codes(rest, block), floats.contiguous().view(torch.float16)
    if symmetric:
        return CompressedTensor(codes.flatten(1), numbers.squeeze(-1), None, args)
    unit, codes = _without_zeros(numbers[..., 0], codes)
    return BlockTensor(codes.flatten(1), unit, None, -numbers[..., 1], None, args)


def _pack_codes(codes: Tensor, block: Kind) -> list[Tensor]:
    """Whole numbers `[out, blocks, 32]` as bytes."""
    if block == "Q8_0":
        return [_as_bytes(codes.to(torch.int8))]
    codes = codes.to(torch.uint8)
    low = (codes & 15).unflatten(2, (2, -1))
    nibbles = low[..., 0, :] | low[..., 1, :] << 4
    if block in ("Q4_0", "Q4_1"):
        return [nibbles]
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    return [((codes >> 4).unflatten(2, (4, 8)) * powers).sum(-1, dtype=torch.uint8), nibbles]


def _unpack_codes(rest: Tensor, block: Kind) -> Tensor:
    """The inverse, as codes uint8 `[out, blocks, 32]`."""
    if block == "Q8_0":
        return rest ^ 128  # signed bytes, shifted to 0 .. 255
    nibbles = rest[..., -BLOCK // 2 :]
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=2)
    if block in ("Q4_0", "Q4_1"):
        return codes
    high = (rest[..., : BLOCK // 8].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return codes | high.flatten(2) << 4


def _without_zeros(scale: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scales `[out, groups]` with 1 in place of 0, and codes `[out, groups, n]` with 0 there."""
    none = scale == 0
    return scale.masked_fill(none, 1), codes.masked_fill(none.unsqueeze(-1), 0)


def _pack_q4_k(tensor: BlockTensor) -> Tensor:
    """uint8 `[out, blocks, 144]`"""
    assert tensor.factors is not None and tensor.minima is not None and tensor.least is not None
    pairs = tensor.codes.unflatten(1, (-1, 4, 2, BLOCK))
    nibbles = (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(2)
    six = _pack_six(tensor.factors.to(torch.uint8).unflatten(1, (-1, 8)), tensor.minima.unflatten(1, (-1, 8)))
    return torch.cat([_as_bytes(tensor.unit.unsqueeze(-1)), _as_bytes(tensor.least.unsqueeze(-1)), six, nibbles], 2)


def _unpack_q4_k(fields: Tensor, args: QuantArgs) -> BlockTensor:
    floats, six, nibbles = fields.split([4, 12, 128], dim=2)
    unit, least = floats.contiguous().view(torch.float16).unbind(-1)
    factors, minima = _unpack_six(six)
    groups = nibbles.unflatten(2, (4, 1, BLOCK))
    codes = torch.cat([groups & 15, groups >> 4], dim=3).flatten(2, 3)  # [out, blocks, 8, 32]
    unit, codes = _without_zeros(unit, codes.flatten(2))
    factors, codes = _without_zeros(factors.flatten(1), codes.reshape(len(codes), -1, BLOCK))
    return BlockTensor(codes.flatten(1), unit, factors.to(torch.int8), least.contiguous(), minima.flatten(1), args)


def _pack_six(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight numbers of 6 bits twice, uint8 `[..., 8]` each, as `[..., 12]`.

    Bytes 0-3 hold scales 0-3 and in their upper bits the upper two of scales 4-7, bytes 4-7 the minima likewise; bytes 8-11
    hold the lower four bits of scales 4-7, and above them those of the minima.
    """
    (s, s_high), (m, m_high) = scales.chunk(2, -1), minima.chunk(2, -1)
    return torch.cat([s | s_high >> 4 << 6, m | m_high >> 4 << 6, (s_high & 15) | (m_high & 15) << 4], dim=-1)


def _unpack_six(six: Tensor) -> tuple[Tensor, Tensor]:
    s, m, low = six.chunk(3, -1)
    return torch.cat([s & 63, low & 15 | s >> 6 << 4], -1), torch.cat([m & 63, low >> 4 | m >> 6 << 4], -1)


def _pack_q6_k(tensor: BlockTensor) -> Tensor:
    """uint8 `[out, blocks, 210]`"""
    assert tensor.factors is not None
    runs = tensor.codes.unflatten(1, (-1, 2, 4, BLOCK))
    low = (runs & 15).unflatten(3, (2, 2)).flatten(4)  # [out, blocks, 2, low or high, 64]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(-1)
    high = (runs >> 4 << shifts).sum(3, dtype=torch.uint8)
    nibbles = low[..., 0, :] | low[..., 1, :] << 4
    scales = tensor.factors.unflatten(1, (-1, 16)).view(torch.uint8)
    return torch.cat([nibbles.flatten(2), high.flatten(2), scales, _as_bytes(tensor.unit.unsqueeze(-1))], dim=2)


def _unpack_q6_k(fields: Tensor, args: QuantArgs) -> BlockTensor:
    low, high, scales, unit = fields.split([128, 64, 16, 2], dim=2)
    nibbles = low.unflatten(2, (2, 1, 64))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(-1)
    bits = high.unflatten(2, (2, 1, BLOCK)) >> shifts & 3  # [out, blocks, 2, 4, 32]
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=3).unflatten(4, (2, BLOCK)).flatten(3, 4) | bits << 4
    units = unit.contiguous().view(torch.float16).squeeze(-1)
    factors = scales.contiguous().view(torch.int8).flatten(1)
    # An empty group's codes mean 0 by the middle of the grid; its scale may then be anything.
    none = (factors == 0) | (units == 0).repeat_interleave(SUPER_BLOCK // 16, 1)
    codes = codes.reshape(len(codes), -1, 16).masked_fill(none.unsqueeze(-1), 2 ** (args.bits - 1))
    return BlockTensor(
        codes.flatten(1), units.masked_fill(units == 0, 1), factors.masked_fill(factors == 0, 1), None, None, args
    )


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)

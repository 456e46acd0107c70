"""The plain torch kernel that every other one is held against: unpack, dequantize, multiply."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compress.formats.bitstream import unpack_rows
from ..compress.grid import dequantize
from ..compress.scheme import QuantArgs


def dequantized(packed: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs, columns: int) -> Tensor:
    """The weight `[out, columns]` in float32: `packed` int32 `[out, words]`, `scale` and `zero` `[out, groups]`."""
    codes = unpack_rows(packed, args.bits, columns)
    scale = scale.float()
    offset = torch.tensor(2 ** (args.bits - 1)) if zero is None else zero
    return dequantize(codes, scale, offset.to(scale).expand_as(scale))


def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, args: QuantArgs, bias: Tensor | None
) -> Tensor:
    """`x W^T + bias` for `x` `[..., in]` of any float dtype; the weight exists in full only during the call."""
    weight = dequantized(packed, scale, zero, args, x.shape[-1])
    return F.linear(x, weight.to(x.dtype), bias)

"""The codebooks of NF4 and of its nested scales (QLoRA, Dettmers et al. 2023), with the same bits as bitsandbytes.

A block of NF4 is divided by its largest magnitude; every value becomes the nearest of 16 quantiles of the normal
distribution. Nested scales are quantized the same way a second time: minus their mean, in blocks of 256, to 256 values of mixed
precision (double quantization).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NESTED_BLOCK = 256
SMALLEST = 1e-38  # the divisor of a block of zeros
CELLS = 32767.5  # bitsandbytes rounds values to a table of 65,536 cells before it looks up nested codes
# Quantiles of the normal distribution, 8 above zero and 7 below, over the largest: QLoRA, appendix E.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize_blocks(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """NF4 of `weight` (float32, any shape) in blocks of `size` of the flattened tensor; the last one may be shorter.

    Returns codes uint8 in the shape of `weight` and the largest magnitudes float32 `[blocks]`.
    """
    scaled, absmax = _divided(weight.flatten(), size)
    return _nearest(scaled, nf4_values(weight.device)).view_as(weight), absmax


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize `absmax` float32 `[blocks]`: codes uint8 `[blocks]`, their scales float32 `[blocks / 256]`, the mean `[]`."""
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    place = (
        ((blocks / nested.unsqueeze(1) + 1) * CELLS + 0.5).nan_to_num(0).floor()
    )  # NaN if all values of a block are equal: the first code
    codes = _nearest(place / CELLS - 1, dynamic_values(absmax.device))
    return codes.flatten()[: len(absmax)], nested, offset


def unnest(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """The inverse of `nest`: float32 `[blocks]`."""
    scale = nested.repeat_interleave(NESTED_BLOCK)[: len(codes)]
    return dynamic_values(codes.device)[codes.int()] * scale + offset


@cache
def nf4_values(device: torch.device) -> Tensor:
    """The 16 values of NF4, float32, ascending."""
    return torch.tensor(NF4_VALUES, device=device)


@cache
def dynamic_values(device: torch.device) -> Tensor:
    """The signed dynamic map of 8 bits (Dettmers 2015), float32 `[256]`, ascending.

    For every exponent e of 0 .. 6: the middles of `2**e` equal intervals of [0.1, 1], times `10**(e - 6)`, with both signs;
    also 0 and 1.
    """
    edges = [torch.linspace(0.1, 1, 2**exponent + 1) for exponent in range(7)]
    positive = torch.cat([(e[:-1] + e[1:]) / 2 * 10.0 ** (exponent - 6) for exponent, e in enumerate(edges)])
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values.to(device)


def _divided(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`flat` `[n]` divided by the largest magnitude of each block, and these magnitudes `[blocks]`.

    Whole blocks are multiplied by the inverse and a shorter last one is divided, as in bitsandbytes: codes depend on it.
    """
    blocks = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    absmax = blocks.abs().amax(1)
    divisor = absmax.clamp(min=SMALLEST)
    scaled = blocks * (1.0 / divisor).unsqueeze(1)
    if len(flat) % size:
        scaled[-1], absmax[-1] = blocks[-1] / divisor[-1], divisor[-1]
    return scaled.flatten()[: len(flat)].clamp_(-1, 1), absmax


def _nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """The nearest entry of the ascending `codebook`, the lower one of two that are equally near: uint8."""
    middles = (codebook[:-1] + codebook[1:]) / 2
    return torch.bucketize(values, middles).to(torch.uint8)

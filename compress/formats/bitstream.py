"""Little-endian bit streams: element k of a row occupies the bits `bits*k .. bits*k + bits - 1` of its 32-bit words."""

import math

import torch
from torch import Tensor


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 `codes` `[rows, n]`, each below `2**bits`, into int32 `[rows, ceil(n * bits / 32)]`."""
    rows, n = codes.shape
    run, words = _run(bits)
    padded = torch.zeros(rows, math.ceil(n / run) * run, dtype=torch.int64, device=codes.device)
    padded[:, :n] = codes
    elements = padded.view(rows, -1, run)
    packed = torch.zeros(rows, elements.shape[1], words, dtype=torch.int64, device=codes.device)
    for k, (word, shift) in enumerate(_places(bits)):
        packed[..., word] |= elements[..., k] << shift
        if shift + bits > 32:  # the element straddles two words
            packed[..., word + 1] |= elements[..., k] >> (32 - shift)
    packed &= 0xFFFFFFFF
    packed = torch.where(packed > 0x7FFFFFFF, packed - 2**32, packed).to(torch.int32)
    return packed.view(rows, -1)[:, : math.ceil(n * bits / 32)].contiguous()


def unpack_rows(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 `[rows, n]`."""
    rows = packed.shape[0]
    run, words = _run(bits)
    count = math.ceil(n / run)
    padded = torch.zeros(rows, count * words, dtype=torch.int64, device=packed.device)
    padded[:, : packed.shape[1]] = packed.to(torch.int64) & 0xFFFFFFFF
    streams = padded.view(rows, count, words)
    codes = torch.empty(rows, count, run, dtype=torch.uint8, device=packed.device)
    for k, (word, shift) in enumerate(_places(bits)):
        value = streams[..., word] >> shift
        if shift + bits > 32:
            value = value | (streams[..., word + 1] << (32 - shift))
        codes[..., k] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)[:, :n].contiguous()


def _run(bits: int) -> tuple[int, int]:
    """The shortest run of elements that fills whole words, and those words."""
    whole = math.lcm(bits, 32)
    return whole // bits, whole // 32


def _places(bits: int) -> list[tuple[int, int]]:
    """Word and shift of every element of a run."""
    return [divmod(bits * k, 32) for k in range(_run(bits)[0])]

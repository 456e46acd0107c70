"""Fields of one, two or four bits packed into bytes, and masks of them."""

import torch
from torch import Tensor


def from_mask(mask: Tensor, columns: int) -> Tensor:
    """The bits of uint8 `mask` `[out, ceil(columns / 8)]`: bool `[out, columns]`."""
    return split(mask, 1, columns).bool()


def join(fields: Tensor, bits: int) -> Tensor:
    """Pack `fields` uint8 `[rows, n]`, each below `2**bits`, into bytes `[rows, ceil(n * bits / 8)]`, low bits first."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(fields, (0, -fields.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)
    return (padded << shifts).sum(2, dtype=torch.uint8)


def split(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `join`: uint8 `[rows, count]`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(2) >> shifts & 2**bits - 1).flatten(1)[:, :count]

"""Weights of which some are zero."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...recipes.scheme import PruneArgs
from ..packing.bitmask import join


@dataclass(frozen=True)
class PrunedTensor:
    """A pruned weight matrix `[out, in]`.

    values  in `args.dtype` `[out, in]`, zero where pruned
    kept    bool `[out, in]`: what is stored, whether or not it happens to be zero
    args    what was asked for, resolved for this layer
    """

    values: Tensor
    kept: Tensor
    args: PruneArgs

    @classmethod
    def of(cls, weight: Tensor, pruned: Tensor, args: PruneArgs) -> "PrunedTensor":
        """Round `weight` `[out, in]` to the stored dtype and clear what is `pruned` (bool `[out, in]`)."""
        assert args.dtype is not None
        return cls(weight.masked_fill(pruned, 0).to(getattr(torch, args.dtype)), ~pruned, args)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.values.shape[0], self.values.shape[1]

    def to(self, device: torch.device | str) -> "PrunedTensor":
        """The same on `device`."""
        return replace(self, values=self.values.to(device), kept=self.kept.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, in `dtype`."""
        return self.values.to(dtype)


def by_mask(tensor: PrunedTensor) -> tuple[Tensor, Tensor]:
    """The bitmask uint8 `[out, ceil(in / 8)]` of what is stored, and that `[stored]`, as `bitmask` lays them out."""
    whole = bool(tensor.kept.all())  # then there is nothing to look for, which takes memory
    return join(tensor.kept.to(torch.uint8), 1), tensor.values.flatten() if whole else tensor.values[tensor.kept]

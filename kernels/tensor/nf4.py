"""NF4: codes of a fixed codebook, and a magnitude per block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...recipes.scheme import QuantArgs
from ..packing.codebook import nest, nf4_values, quantize_blocks, unnest
from .parts import moved


@dataclass(frozen=True)
class NF4Tensor:
    """A weight matrix in NF4 `[out, in]`: `absmax * NF4[code]`, with an absmax for every block of the flattened matrix.

    codes   uint8 `[out, in]`, values 0 .. 15
    absmax  `[blocks]`: float32, or uint8 if it is quantized itself, to `nested * DYNAMIC[absmax] + offset`
    nested  float32 `[blocks / 256]`, `offset` float32 `[]`; None if the absmax is not quantized
    args    `args.group_size` values make a block, `args.dtype` is that of the original weight
    """

    codes: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None
    args: QuantArgs

    @classmethod
    def of(cls, weight: Tensor, args: QuantArgs) -> "NF4Tensor":
        """The nearest codes of `weight` `[out, in]`, as bitsandbytes finds them."""
        assert args.group_size is not None
        codes, absmax = quantize_blocks(weight.float(), args.group_size)
        return cls(codes, *(nest(absmax) if args.scale_dtype == "nested" else (absmax, None, None)), args)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def rows_are_blocks(self) -> bool:
        """Whether no block reaches from one row into the next."""
        return self.shape[1] % (self.args.group_size or 1) == 0

    def scales(self) -> Tensor:
        """The magnitudes that are served, float32 `[blocks]`."""
        if self.nested is None or self.offset is None:
            return self.absmax
        return unnest(self.absmax, self.nested, self.offset)

    def to(self, device: torch.device | str) -> "NF4Tensor":
        """The same on `device`."""
        return moved(self, device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        assert self.args.group_size is not None
        scale = self.scales().to(dtype).repeat_interleave(self.args.group_size)[: self.codes.numel()]
        return nf4_values(self.codes.device).to(dtype)[self.codes.int()] * scale.view(self.shape)

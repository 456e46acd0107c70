"""A quantized matrix whose codes, scales and zeros can be learned.

    codes = clamp(round(start + offset * unit + zero - zero_0), 0, maxq)      Q = scale * (codes - zero)

`start` is the given weight in steps of the grid, clamped to the cell of the code that the quantizer chose. So `Q` starts
exactly at the quantizer's result. If the given weight is that result too, all codes start in the middle of their cells; if it
is the original weight, a code changes the sooner the nearer its weight lies to the border of the cell.

Scales and zeros are rounded with straight-through gradients. Codes may be rounded softly during training: by a sigmoid of the
position between two codes, whose `softness` decreases. The loss is then smooth with an exact gradient, and codes settle one
after another; with straight-through gradients, all weights near a border flip back and forth at every step.
"""

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ....kernels.tensor import CompressedTensor
from ....kernels.tensor.grid import stored

MAX_START_OFFSET = 0.49  # largest distance of `start` from its code, in steps
MAX_LOG_STRETCH = math.log(2)  # a scale at most doubles or halves


class LearnableQuantizer(nn.Module):
    """The learnable form of `tensor`, the quantized form of `weight` `[out, in]` float32.

    offset   `[out, groups, columns]`, in steps of the grid, or in units of the weight if `in_weights`
    stretch  `[out, groups]`, logarithm of the scale's change, clamped so that it at most doubles or halves
    zero     `[out, groups]`, in steps of the grid
    """

    def __init__(self, weight: Tensor, tensor: CompressedTensor, in_weights: bool = False) -> None:
        super().__init__()
        scale = tensor.scale.float()
        zero = torch.full_like(scale, 2 ** (tensor.args.bits - 1)) if tensor.zero is None else tensor.zero.float()
        codes = tensor.codes.float().unflatten(1, (scale.shape[1], -1))
        position = weight.unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1) + zero.unsqueeze(-1)
        self._tensor, self._scale, self._zero = tensor, scale, zero
        self._start = codes + (position - codes).clamp(-MAX_START_OFFSET, MAX_START_OFFSET)
        self._unit = 1 / scale.unsqueeze(-1) if in_weights else 1.0
        self.offset = nn.Parameter(torch.zeros_like(codes))
        self.stretch = nn.Parameter(torch.zeros_like(scale))
        self.zero = nn.Parameter(zero.clone())

    @property
    def rows_share_a_scale(self) -> bool:
        """Whether the scales of different rows must stay equal."""
        return self._tensor.args.strategy == "tensor"

    @property
    def has_zeros(self) -> bool:
        """Whether the format stores zeros."""
        return self._tensor.zero is not None

    def forward(self, softness: float = 0.0) -> Tensor:
        """The dequantized weight, float32 `[out, in]`. With `softness` above 0, codes are rounded softly.

        The softness is the width of the sigmoid, in steps of the grid.
        """
        codes, scale, zero = self._parts(softness)
        return ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)

    @torch.no_grad()
    def tensor(self) -> CompressedTensor:
        """The quantized tensor as stored: `tensor().dequantize()` equals `forward()`."""
        codes, scale, zero = self._parts()
        return replace(
            self._tensor,
            codes=codes.flatten(1).to(torch.uint8),
            scale=scale.to(self._tensor.args.torch_scale_dtype),
            zero=zero.to(torch.uint8) if self.has_zeros else None,
        )

    def _parts(self, softness: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[out, groups, columns]`, scale and zero `[out, groups]`; with softness 0 exactly as they are stored."""
        args, dtype = self._tensor.args, self._tensor.args.torch_scale_dtype
        factor = self.stretch.clamp(-MAX_LOG_STRETCH, MAX_LOG_STRETCH).exp()
        stretched = (self._scale * factor).clamp(max=torch.finfo(dtype).max)
        scale = _straight_through(stretched, stored(stretched.detach(), args))
        zero = _straight_through(self.zero, self.zero.detach().round().clamp(0, args.maxq))
        position = self._start + self.offset * self._unit + (zero - self._zero).unsqueeze(-1)
        return _round(position, softness).clamp(0, args.maxq), scale, zero


def _round(position: Tensor, softness: float) -> Tensor:
    if not softness:
        return _straight_through(position, position.detach().round())
    below = position.detach().floor()
    return below + torch.sigmoid((position - below - 0.5) / softness)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`. The usual `value + (rounded - value).detach()` has rounding errors."""
    return cast(Tensor, _StraightThrough.apply(value, rounded))

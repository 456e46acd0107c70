"""A quantized matrix whose codes, scales and zeros can be learned.

    codes = clamp(round(start + offset * unit + zero - zero_0), 0, maxq)      Q = scale * (codes - zero)

`start` is the weight that it is given, in steps of the grid, drawn into the cell of the code that the quantizer chose for it.
So `Q` begins as exactly what the quantizer left. Behind a quantizer the weight is what that left as well, and all codes begin
in the middle of their cells; given the original weight, a code moves the sooner the nearer its weight lies to the border.

Gradients pass straight through the rounding of scales and zeros. Codes may be rounded softly while they are trained: by a
sigmoid of the place between two codes, whose `softness` sinks. The loss is then smooth and its gradient true, and what is
undecided comes to a decision one by one; straight through, all weights near a border jump to and fro at every step.
"""

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ....kernels.tensor import CompressedTensor
from ....kernels.tensor.grid import stored

INSIDE = 0.49  # how far from its code a weight may begin, in steps
WIDEST = math.log(2)  # a scale at most doubles or halves


class LearnableQuantizer(nn.Module):
    """The learnable form of `tensor`, which quantizes `weight` `[out, in]` float32.

    `offset` `[out, groups, columns]` counts in steps of the grid, with `in_weights` in units of the weight. `stretch`
    `[out, groups]` is the logarithm of the scale's change, which at most doubles or halves it.
    """

    def __init__(self, weight: Tensor, tensor: CompressedTensor, in_weights: bool = False) -> None:
        super().__init__()
        scale = tensor.scale.float()
        zero = torch.full_like(scale, 2 ** (tensor.args.bits - 1)) if tensor.zero is None else tensor.zero.float()
        codes = tensor.codes.float().unflatten(1, (scale.shape[1], -1))
        place = weight.unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1) + zero.unsqueeze(-1)
        self._tensor, self._scale, self._zero = tensor, scale, zero
        self._start = codes + (place - codes).clamp(-INSIDE, INSIDE)
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
        """The weight that would be served, float32 `[out, in]`; codes lie between two of them as far as `softness` is large."""
        codes, scale, zero = self._parts(softness)
        return ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)

    @torch.no_grad()
    def tensor(self) -> CompressedTensor:
        """What would be stored: `tensor().dequantize()` is `forward()`."""
        codes, scale, zero = self._parts()
        return replace(
            self._tensor,
            codes=codes.flatten(1).to(torch.uint8),
            scale=scale.to(self._tensor.args.torch_scale_dtype),
            zero=zero.to(torch.uint8) if self.has_zeros else None,
        )

    def _parts(self, softness: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[out, groups, columns]`, scale and zero `[out, groups]`, exactly as they are stored (without softness)."""
        args, dtype = self._tensor.args, self._tensor.args.torch_scale_dtype
        stretched = (self._scale * self.stretch.clamp(-WIDEST, WIDEST).exp()).clamp(max=torch.finfo(dtype).max)
        scale = _through(stretched, stored(stretched.detach(), args))
        zero = _through(self.zero, self.zero.detach().round().clamp(0, args.maxq))
        place = self._start + self.offset * self._unit + (zero - self._zero).unsqueeze(-1)
        return _rounded(place, softness).clamp(0, args.maxq), scale, zero


def _rounded(place: Tensor, softness: float) -> Tensor:
    if not softness:
        return _through(place, place.detach().round())
    below = place.detach().floor()
    return below + torch.sigmoid((place - below - 0.5) / softness)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`: exact, where `value + (rounded - value).detach()` is off by a bit."""
    return cast(Tensor, _StraightThrough.apply(value, rounded))

"""Keys or values of past tokens as packed codes.

States `[batch, heads, tokens, width]` are stored as channels `[batch, heads * width, tokens]`. A scale is shared by
neighbouring tokens of a channel (keys, whose outliers are in channels) or by neighbouring channels of a token (values). In both
cases the first axis of everything stored is the batch and the last one is time, so that the cache grows at its end and rows can
be selected. A calibrated (static) scale of a channel is shared by all rows and tokens.

    state = scale * code + low          symmetric: low = -2**(bits-1) * scale, which is not stored
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import CompressError
from ...recipes.scheme import QuantArgs
from ..tensor.grid import encode, fit_groups, parameters


@dataclass
class PackedStates:
    """The quantized states of `tokens` past tokens under `args`.

    codes       uint8 `[batch, channels, tokens * bits / 8]`, eight tokens in `bits` bytes
    scale, low  in `args.scale_dtype`: `[batch, channels, tokens / group]` for groups of tokens, `[batch, groups, tokens]` for
                groups of channels, `[1, channels, 1]` or `[1, 1, 1]` if they are static; `low` is None for symmetric grids
    heads       the number of heads that the channels belong to
    """

    args: QuantArgs
    along_tokens: bool
    heads: int
    codes: Tensor
    scale: Tensor
    low: Tensor | None

    @classmethod
    def of(cls, states: Tensor, args: QuantArgs, along_tokens: bool) -> "PackedStates":
        """Quantize `states` `[batch, heads, tokens, width]`; the number of tokens is a multiple of 8 and of the
        group along them.

        Raises `CompressError` if a state overflows the dtype of the scales.
        """
        channels = _channels(states)
        lines = channels if along_tokens else channels.transpose(1, 2)
        args = args if along_tokens else args.for_width(lines.shape[2])
        groups = lines.unflatten(2, (-1, args.columns_per_scale(lines.shape[2])))
        scale, zero, low = _grid(*fit_groups(groups, args), args)
        codes = encode(groups, scale.unsqueeze(-1), zero.unsqueeze(-1), args).flatten(2).to(torch.uint8)
        stored = [None if t is None else t.to(args.torch_scale_dtype) for t in (scale, low)]
        if not along_tokens:
            codes = codes.transpose(1, 2)
            stored = [None if t is None else t.transpose(1, 2) for t in stored]
        scale, low = stored
        assert scale is not None
        return cls(args, along_tokens, states.shape[1], pack(codes, args.bits), scale.contiguous(), low)

    @classmethod
    def within(cls, states: Tensor, args: QuantArgs, ends: Tensor) -> "PackedStates":
        """Quantize `states` `[batch, heads, tokens, width]` between the calibrated `ends` `[heads * width, 2]` of the channels,
        or `[1, 2]` for all of them.

        States beyond the ends are clamped. Raises `CompressError` if the number of ranges is not that of the channels.
        """
        channels = _channels(states)
        expected = 1 if args.strategy == "tensor" else channels.shape[1]
        if len(ends) != expected:
            raise CompressError(
                f"expected {expected} calibrated cache ranges, got {len(ends)}",
                "load the checkpoint that the ranges were calibrated for",
            )
        scale, zero = parameters(ends[:, 0], ends[:, 1], args)
        scale, zero, low = _grid(scale.float(), zero.float(), args)
        codes = encode(channels, scale.unsqueeze(-1), zero.unsqueeze(-1), args).to(torch.uint8)
        stored = [None if t is None else t.to(args.torch_scale_dtype).view(1, -1, 1) for t in (scale, low)]
        assert stored[0] is not None
        return cls(args, True, states.shape[1], pack(codes, args.bits), stored[0], stored[1])

    @property
    def tokens(self) -> int:
        """The number of stored tokens."""
        return self.codes.shape[2] * 8 // self.args.bits

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and low ends."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.low) if t is not None)

    def states(self, dtype: torch.dtype) -> Tensor:
        """The dequantized states `[batch, heads, tokens, width]` in `dtype`, computed in float32."""
        lines = unpack(self.codes, self.args.bits).float()
        scale = self.scale.float()
        low = -(2.0 ** (self.args.bits - 1)) * scale if self.low is None else self.low.float()
        axis = 2 if self.along_tokens else 1
        groups = lines.unflatten(axis, (scale.shape[axis], -1))
        values = torch.addcmul(low.unsqueeze(axis + 1), groups, scale.unsqueeze(axis + 1)).flatten(axis, axis + 1)
        return values.unflatten(1, (self.heads, -1)).transpose(2, 3).to(dtype)

    def append(self, later: "PackedStates") -> None:
        """Append the states of later tokens."""
        self.codes = torch.cat([self.codes, later.codes], 2)
        if self.args.dynamic:
            self.scale = torch.cat([self.scale, later.scale], 2)
            self.low = None if self.low is None or later.low is None else torch.cat([self.low, later.low], 2)

    def truncate(self, tokens: int) -> None:
        """Remove all but the first `tokens`, a multiple of 8 and of the group."""
        scales = self.scale.shape[2] * tokens // self.tokens
        self.codes = self.codes[..., : tokens * self.args.bits // 8]
        if self.args.dynamic:
            self.scale = self.scale[..., :scales]
            self.low = None if self.low is None else self.low[..., :scales]

    def select(self, rows: Tensor) -> None:
        """Keep the `rows` of the batch (indices, which may repeat), in their order."""
        rows = rows.to(self.codes.device)
        self.codes = self.codes[rows]
        if self.args.dynamic:
            self.scale = self.scale[rows]
            self.low = None if self.low is None else self.low[rows]


def _channels(states: Tensor) -> Tensor:
    """`[batch, heads, tokens, width]` as float32 `[batch, heads * width, tokens]`."""
    return states.float().transpose(2, 3).flatten(1, 2)


def _grid(scale: Tensor, zero: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale, zero and low end as they are stored: `zero` follows from the rounded `low`, which is None for symmetric grids."""
    if args.symmetric:
        return scale, zero, None
    low = _stored(-zero * scale, args)
    return scale, -low / scale, low


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 `codes` `[..., n]` below `2**bits`, `n` a multiple of 8, into uint8 `[..., n * bits / 8]`.

    Eight codes become `bits` bytes: each of their pieces of 8, 4, 2 or 1 bits fills as many bytes, the first code in
    the low bits.
    """
    eights = codes.unflatten(-1, (-1, 8))
    pieces = []
    for shift, width in _pieces(bits):
        piece = ((eights >> shift) & (2**width - 1)).unflatten(-1, (width, -1))
        pieces.append((piece << _places(width, codes.device)).sum(-1, dtype=torch.uint8))
    return torch.cat(pieces, -1).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    pieces = _pieces(bits)
    parts = packed.unflatten(-1, (-1, bits)).split([width for _, width in pieces], -1)
    eights = torch.zeros((), dtype=torch.uint8, device=packed.device)
    for part, (shift, width) in zip(parts, pieces, strict=True):
        piece = (part.unsqueeze(-1) >> _places(width, packed.device)) & (2**width - 1)
        eights = eights | (piece.flatten(-2) << shift)
    return eights.flatten(-2)


def _pieces(bits: int) -> list[tuple[int, int]]:
    """Shift and width of the pieces of a code: the powers of two whose sum is `bits`, widest first."""
    widths = [width for width in (8, 4, 2, 1) if bits & width]
    return [(sum(widths[:i]), width) for i, width in enumerate(widths)]


def _places(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


def _stored(low: Tensor, args: QuantArgs) -> Tensor:
    dtype, largest = args.torch_scale_dtype, float(low.abs().max())
    if largest > torch.finfo(dtype).max:
        raise CompressError(f"a cached state of {largest:.3g} overflows {args.scale_dtype}", "use float32 scales")
    return low.to(dtype).float()

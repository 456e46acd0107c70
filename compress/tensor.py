"""What a pass leaves in place of a weight: one of the kinds of `Compressed`. Formats write it, kernels serve it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import CompressError
from .grid import Grid, dequantize, encode, parameters
from .quantize.codebook import nest, nf4_values, quantize_blocks, unnest
from .scheme import PruneArgs, QuantArgs

TILE = 16  # output rows that share one second-level grid (SpQR)
LEVEL = QuantArgs(bits=3, symmetric=False, strategy="channel", group_size=None, formula="spqr")  # of scales and zeros
InputGrid = tuple[Tensor, Tensor]  # scale and zero of a layer's inputs
CONSTANT = 2**-9  # a spread below this share of the values is none: its zero would leave the range of float16


@dataclass(frozen=True)
class CompressedTensor:
    """A quantized weight matrix `[out, in]`: `dequantized = scale * (codes - zero)`.

    codes  uint8 `[out, in]`, values `0 .. 2**bits - 1`
    scale  `args.scale_dtype` `[out, groups]` (one group per row for channel and tensor grids)
    zero   uint8 `[out, groups]`, or None where the grid is symmetric (then it is `2**(bits - 1)`)
    args   the grid's description, its group size resolved for this width
    inputs how the layer's inputs are quantized, or None; where that is static, `input_grid` holds their scale
           (`inputs.scale_dtype`) and zero (float32), both `[1]`
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    args: QuantArgs
    inputs: QuantArgs | None = None
    input_grid: InputGrid | None = None

    @classmethod
    def from_grid(cls, codes: Tensor, grid: Grid) -> "CompressedTensor":
        """Join the codes `[out, in]` and the grid that gave them."""
        rows = codes.shape[0]
        scale = grid.scale.to(grid.args.torch_scale_dtype).expand(rows, -1).contiguous()
        if not grid.args.symmetric and bool(((grid.zero < 0) | (grid.zero > grid.args.maxq)).any()):
            raise CompressError(
                f"a zero of the {grid.args.formula!r} grid does not fit {grid.args.bits} bits", "use --set formula=gptq"
            )
        zero = None if grid.args.symmetric else grid.zero.to(torch.uint8).expand(rows, -1).contiguous()
        return cls(codes.to(torch.uint8), scale, zero, grid.args)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device | str) -> "CompressedTensor":
        """The same on `device`."""
        grid = None if self.input_grid is None else (self.input_grid[0].to(device), self.input_grid[1].to(device))
        return replace(moved(self, device), input_grid=grid)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        zero = 2 ** (self.args.bits - 1) if self.zero is None else self.zero.to(dtype)
        scale = self.scale.to(dtype)
        return dequantize(self.codes, scale, torch.as_tensor(zero, dtype=dtype, device=scale.device).expand_as(scale))


@dataclass(frozen=True)
class BlockTensor:
    """A weight matrix `[out, in]` in GGUF's blocks: `scale * codes - minimum`, or `scale * (codes - 2**(bits - 1))`.

    codes    uint8 `[out, in]`
    unit     float16 `[out, blocks]`: a group's scale is its unit times its factor, or the unit itself where blocks are groups
    factors  int8 `[out, groups]`, never 0; None where blocks are groups
    least    float16 `[out, blocks]` and `minima` uint8 `[out, groups]`: the minimum likewise; None where it is symmetric
    """

    codes: Tensor
    unit: Tensor
    factors: Tensor | None
    least: Tensor | None
    minima: Tensor | None
    args: QuantArgs

    @classmethod
    def from_grid(cls, codes: Tensor, grid: Grid) -> "BlockTensor":
        """Join the codes `[out, in]` and the super-blocks that gave them."""
        assert grid.units is not None
        factors, minima = grid.units.factors(grid.scale, grid.scale * grid.zero, grid.args)
        least = None if grid.units.minimum is None else grid.units.minimum.half()
        minima = None if minima is None else minima.to(torch.uint8)
        return cls(codes.to(torch.uint8), grid.units.scale.half(), factors.to(torch.int8), least, minima, grid.args)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // (self.unit if self.factors is None else self.factors).shape[1]

    def scales(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of every group, `[out, groups]`; exact in float32."""
        return _times(self.unit, self.factors, dtype)

    def minimums(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Of every group, `[out, groups]`; exact in float32. None where it is symmetric."""
        return None if self.least is None else _times(self.least, self.minima, dtype)

    def zeros(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The minima in steps, real numbers `[out, groups]`; None where it is symmetric."""
        minimum = self.minimums(dtype)
        return None if minimum is None else minimum / self.scales(dtype)

    def to(self, device: torch.device | str) -> "BlockTensor":
        """The same on `device`."""
        return moved(self, device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`; float32 rounds once, as llama.cpp does."""
        scale, minimum = self.scales(dtype).unsqueeze(-1), self.minimums(dtype)
        codes = self.codes.unflatten(1, (scale.shape[1], -1)).to(dtype)
        if minimum is None:
            return ((codes - 2 ** (self.args.bits - 1)) * scale).flatten(1)
        return (codes * scale - minimum.unsqueeze(-1)).flatten(1)


def _times(unit: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    if factors is None:
        return unit.to(dtype)
    return unit.to(dtype).repeat_interleave(factors.shape[1] // unit.shape[1], 1) * factors.to(dtype)


def of_grid(codes: Tensor, grid: Grid) -> "CompressedTensor | BlockTensor":
    """What stores the codes `[out, in]` of a `grid`."""
    return (CompressedTensor if grid.units is None else BlockTensor).from_grid(codes, grid)


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


@dataclass(frozen=True)
class TwoLevel:
    """One number per row and group, itself quantized to `LEVEL.bits` bits in tiles of 16 rows (SpQR's second level).

    codes  uint8 `[out, groups]`
    scale, zero  float16 `[ceil(out / 16), groups]`: `value = scale * (code - zero)`
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def fit(cls, values: Tensor) -> "TwoLevel":
        """Quantize `values` `[out, groups]`; the last tile is filled up with the last row, which widens no range."""
        rows = len(values)
        padded = torch.cat([values, values[-1:].expand(-rows % TILE, -1)])
        tiles = padded.unflatten(0, (-1, TILE)).transpose(1, 2)  # [tiles, groups, 16]
        low, high = tiles.amin(-1), tiles.amax(-1)
        flat = high - low <= CONSTANT * torch.maximum(low.abs(), high.abs())
        middle = (low + high) / 2
        scale, zero = parameters(torch.where(flat, middle, low), torch.where(flat, middle, high), LEVEL)
        zero = zero.half().to(scale.dtype)
        codes = encode(tiles, scale.unsqueeze(-1), zero.unsqueeze(-1), LEVEL)
        codes = codes.transpose(1, 2).flatten(0, 1)[:rows].to(torch.uint8)
        return cls(codes, scale.half(), zero.half())

    def to(self, device: torch.device | str) -> "TwoLevel":
        """The same on `device`."""
        return TwoLevel(self.codes.to(device), self.scale.to(device), self.zero.to(device))

    def values(self, dtype: torch.dtype) -> Tensor:
        """The numbers that are served `[out, groups]`, computed in `dtype`."""
        rows = len(self.codes)
        scale, zero = (t.to(dtype).repeat_interleave(TILE, 0)[:rows] for t in (self.scale, self.zero))
        return (self.codes.to(dtype) - zero) * scale


@dataclass(frozen=True)
class SpQRTensor:
    """Codes with two-level scales and zeros, plus a sparse residual: `scale * (codes - zero) + residual`, `[out, in]`.

    codes    uint8 `[out, in]`; groups of `args.group_size` columns, the last one may be shorter
    counts   int64 `[out]`, entries of the residual per row
    columns  int64 `[entries]`, row after row
    values   float16 `[entries]`: what the dense part lacks, so that the sum of both is what was evaluated
    """

    codes: Tensor
    scale: TwoLevel
    zero: TwoLevel
    counts: Tensor
    columns: Tensor
    values: Tensor
    args: QuantArgs

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device | str) -> "SpQRTensor":
        """The same on `device`."""
        residual = (self.counts.to(device), self.columns.to(device), self.values.to(device))
        return SpQRTensor(self.codes.to(device), self.scale.to(device), self.zero.to(device), *residual, self.args)

    def grid(self, dtype: torch.dtype = torch.float32) -> Grid:
        """The served scales and real zeros `[out, groups]`."""
        return Grid(self.scale.values(dtype), self.zero.values(dtype), self.args)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense part alone."""
        grid, width = self.grid(dtype), self.codes.shape[1]
        size = self.args.columns_per_scale(width)
        scale, zero = (t.repeat_interleave(size, 1)[:, :width] for t in (grid.scale, grid.zero))
        return (self.codes.to(dtype) - zero) * scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        weight = self.dense(dtype)
        rows = torch.arange(len(self.counts), device=self.codes.device).repeat_interleave(self.counts)
        weight[rows, self.columns] += self.values.to(dtype)
        return weight


@dataclass(frozen=True)
class NF4Tensor:
    """A weight matrix in NF4 `[out, in]`: `absmax * NF4[code]`, with an absmax for every block of the flattened matrix.

    codes   uint8 `[out, in]`, values 0 .. 15
    absmax  `[blocks]`: float32, or uint8 where it is quantized itself, to `nested * DYNAMIC[absmax] + offset`
    nested  float32 `[blocks / 256]`, `offset` float32 `[]`; None where the absmax is not quantized
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


@dataclass(frozen=True)
class MixedTensor:
    """A weight matrix `[out, in]` in 8 bits with some input columns in 16 (LLM.int8), for inputs that are quantized too.

    codes    uint8 `[out, in]`, those of the 16-bit columns among them: other runtimes have only these
    scale    float `[out, 1]`: `scale * (codes - 128)`
    columns  int64 `[kept]`, ascending, and `outliers` float16 `[out, kept]`, their weights
    inputs   a dynamic scale per token; columns that reach its threshold are not quantized
    """

    codes: Tensor
    scale: Tensor
    columns: Tensor
    outliers: Tensor
    args: QuantArgs
    inputs: QuantArgs

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def grid(self) -> CompressedTensor:
        """The 8-bit part alone, which covers all columns."""
        return CompressedTensor(self.codes, self.scale, None, replace(self.args, outliers=0.0))

    def to(self, device: torch.device | str) -> "MixedTensor":
        """The same on `device`."""
        return moved(self, device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        return self.grid.dequantize(dtype).index_copy_(1, self.columns, self.outliers.to(dtype))


Quantized = CompressedTensor | BlockTensor | SpQRTensor | NF4Tensor | MixedTensor


@dataclass(frozen=True)
class LowRankTensor:
    """A quantized weight with what it lacks most, as a product of two narrow matrices: `base + left @ right`, `[out, in]`.

    left   float16 `[out, rank]`
    right  float16 `[rank, in]`
    """

    base: Quantized
    left: Tensor
    right: Tensor

    @property
    def args(self) -> QuantArgs:
        """The arguments of the base, with the rank."""
        return replace(self.base.args, rank=self.left.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.base.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` that is served, computed in `dtype`."""
        return self.base.dequantize(dtype).addmm_(self.left.to(dtype), self.right.to(dtype))


Compressed = Quantized | PrunedTensor | LowRankTensor
Served = CompressedTensor | BlockTensor | NF4Tensor | MixedTensor  # those whose codes a kernel multiplies
AnyServed = TypeVar("AnyServed", CompressedTensor, BlockTensor, NF4Tensor, MixedTensor)


def parts(tensor: Served) -> dict[str, Tensor | None]:
    """The tensors of `tensor` by their fields' names, `None` where one is left out."""
    return {each.name: getattr(tensor, each.name) for each in fields(tensor) if each.type in (Tensor, Tensor | None)}


def settings(tensor: Served) -> dict[str, Any]:
    """What else a tensor knows of itself: its arguments."""
    return {each.name: getattr(tensor, each.name) for each in fields(tensor) if each.name not in parts(tensor)}


def moved(tensor: AnyServed, device: torch.device | str) -> AnyServed:
    """The same on `device`."""
    return replace(tensor, **{name: part.to(device) for name, part in parts(tensor).items() if part is not None})


def joined(tensors: Sequence[CompressedTensor]) -> CompressedTensor:
    """One weight out of runs of its rows, which share their arguments."""
    zeros = [tensor.zero for tensor in tensors if tensor.zero is not None]
    return replace(
        tensors[0],
        codes=torch.cat([tensor.codes for tensor in tensors]),
        scale=torch.cat([tensor.scale for tensor in tensors]),
        zero=torch.cat(zeros) if zeros else None,
    )

"""What a kernel is given: one layer's quantized weight, in no kernel's layout."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recipes.scheme import kinds
from .packing.bitmask import from_mask
from .tensor import TILE, Bilevel, Compressed, PrunedTensor
from .tensor.parts import moved
from .tensor.pruned import by_mask


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix in compressed rows: row r holds the entries `starts[r] .. starts[r + 1] - 1`.

    starts   int64 `[rows + 1]`
    columns  int32 `[entries]`, or uint16 if the matrix is no wider than that
    values   float16 `[entries]`
    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, dense: Tensor) -> "SparseRows":
        """The entries of `dense` `[rows, columns]` that are not zero."""
        rows, columns = dense.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(dense))
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(starts, columns.to(torch.int32), dense[rows, columns].half())

    @property
    def rows(self) -> Tensor:
        """The row of every entry, int64 `[entries]`."""
        return torch.repeat_interleave(self.starts.diff())

    def to(self, device: torch.device | str) -> "SparseRows":
        """The same on `device`."""
        return moved(self, device)

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """`y + x S^T` for `x` `[m, columns]`, in the dtype of `y` `[m, rows]`, by torch alone."""
        return y.index_add(1, self.rows, x.to(y.dtype)[:, self.columns.long()] * self.values)


@dataclass(frozen=True)
class Levels:
    """The bilevel scales and zeros of SpQR in tiles of 16 rows; the last tile is padded with zeros.

    codes  uint8 `[tiles, groups, 16]`: the code of a row's scale in the low nibble, that of its zero in the high one
    grids  float16 `[tiles, groups, 4]`: scale and zero of the scale codes, then those of the zero codes
    """

    codes: Tensor
    grids: Tensor

    @classmethod
    def of(cls, scale: Bilevel, zero: Bilevel) -> "Levels":
        """The codes and grids of `scale` and `zero`, joined."""
        both = scale.codes | zero.codes << 4
        tiles = F.pad(both, (0, 0, 0, -len(both) % TILE)).unflatten(0, (-1, TILE)).transpose(1, 2)
        grids = (scale.scale, scale.zero, zero.scale, zero.zero)
        return cls(tiles.contiguous(), torch.stack(grids, -1).contiguous())

    def to(self, device: torch.device | str) -> "Levels":
        """The same on `device`."""
        return moved(self, device)

    def two(self, rows: int) -> tuple[Bilevel, Bilevel]:
        """The scales and the zeros of the first `rows` rows."""
        codes = self.codes.transpose(1, 2).flatten(0, 1)[:rows]
        grids = [part.contiguous() for part in self.grids.unbind(-1)]
        return Bilevel(codes & 15, *grids[:2]), Bilevel(codes >> 4, *grids[2:])


@dataclass(frozen=True)
class Weight:
    """A weight `[out, in]`: `scale * (codes - zero)`, or `scale * codebook[codes]`, plus outlier columns and a residual.

    codes     uint8 `[out, in]`, below `2**bits`
    scale     float `[out, groups]`; group g covers the columns `g * group ..`, the last group may be shorter
    zero      `[out, groups]`, integers or reals; None if it is `2**(bits - 1)`, and with a codebook
    codebook  float `[2**bits]`, or None for a uniform grid
    columns, outliers  the indices int64 `[c]` of input columns in high precision, and their weights `[out, c]`; the
              codes of these columns do not count
    threshold  from which on a value of the inputs takes its column out of the int8 product; 0: none does
    residual  sparse entries `[out, in]` that are added to the rest (SpQR), or None
    levels    what scale and zero come from (SpQR), or None; kernels may hold this instead
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    codebook: Tensor | None = None
    columns: Tensor | None = None
    outliers: Tensor | None = None
    threshold: float = 0.0
    residual: SparseRows | None = None
    levels: Levels | None = None

    @classmethod
    def of(cls, tensor: Compressed) -> "Weight":
        """The weight of a tensor of codes, as its kind gives it; quantized scales become float32."""
        return kinds.kind_of_tensor(tensor).operand(tensor)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device | str) -> "Weight":
        """The same on `device`."""
        residual, levels = self.residual and self.residual.to(device), self.levels and self.levels.to(device)
        return replace(moved(self, device), residual=residual, levels=levels)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` computed in `dtype`: the reference for every kernel."""
        width = self.codes.shape[1]
        scale = self.scale.to(dtype).repeat_interleave(self.group, dim=1)[:, :width]
        if self.codebook is not None:
            values = self.codebook.to(dtype)[self.codes.int()]
        elif self.zero is None:
            values = self.codes.to(dtype) - 2 ** (self.bits - 1)
        else:
            values = self.codes.to(dtype) - self.zero.to(dtype).repeat_interleave(self.group, dim=1)[:, :width]
        dense = values * scale
        if self.columns is not None and self.outliers is not None:
            dense[:, self.columns] = self.outliers.to(dtype)
        if self.residual is not None:
            place = (self.residual.rows, self.residual.columns.long())
            dense.index_put_(place, self.residual.values.to(dtype), accumulate=True)
        return dense


MASKS_AT_ONCE = 1024  # rows


@dataclass(frozen=True)
class PrunedWeight:
    """A weight `[out, in]` of floats of which only some are stored; the others are zero.

    mask    uint8 `[out, ceil(in / 8)]`: bit `j % 8` of byte `j // 8` of a row: column `j` is stored
    values  float `[stored]`, row after row
    width   in_features
    """

    mask: Tensor
    values: Tensor
    width: int

    @classmethod
    def of(cls, tensor: PrunedTensor) -> "PrunedWeight":
        """The weight of a pruned tensor, however it is stored on disk."""
        return cls(*by_mask(tensor), tensor.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.mask.shape[0], self.width

    def to(self, device: torch.device | str) -> "PrunedWeight":
        """The same on `device`."""
        return moved(self, device)

    def kept(self) -> Tensor:
        """What is stored: bool `[out, in]`."""
        return from_mask(self.mask, self.width)

    def starts(self) -> Tensor:
        """The number of the first value of each row, int64 `[out + 1]`."""
        pieces = self.mask.split(MASKS_AT_ONCE)  # a sum of booleans makes integers of them first
        counts = torch.cat([from_mask(piece, self.width).sum(1) for piece in pieces])
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out, in]` in `dtype`: the reference for every kernel."""
        kept = self.kept()
        return self.values.new_zeros(kept.shape, dtype=dtype).masked_scatter_(kept, self.values.to(dtype))

"""RTN: round every weight to the nearest point of its grid. Needs no calibration; the baseline of all other methods."""

from dataclasses import replace
from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....kernels.tensor import BlockTensor, CompressedTensor, NF4Tensor, of_grid
from ....kernels.tensor.grid import Grid
from ....recipes.scheme import QuantArgs, Scheme
from ...block import Block


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RTN:
    """Options of rounding to nearest: those of its scheme."""

    scheme: Scheme = Scheme()
    needs: ClassVar[frozenset[str]] = frozenset()
    true_sequential: ClassVar[bool] = False


def apply(config: RTN, block: Block) -> None:
    """Quantize every linear of the block."""
    for linear in block.linears:
        linear.result = round_to_nearest(linear.weight, linear.grid_args)


def round_to_nearest(
    weight: Tensor, args: QuantArgs, importance: Tensor | None = None
) -> CompressedTensor | BlockTensor:
    """`weight` `[out, in]` rounded to nearest. `importance` `[in]` weights the errors of grids with observer `mse`."""
    grid = Grid.fit(weight, args, importance)
    return of_grid(grid.quantize(weight), grid)


def rounded(weight: Tensor, args: QuantArgs) -> Tensor:
    """`weight` `[out, in]` after rounding to nearest, for any kind of `args`; 16-bit outlier columns are rounded too."""
    args = replace(args, rank=0)
    if args.kind == "nf4":
        return NF4Tensor.of(weight, args).dequantize(weight.dtype)
    return round_to_nearest(weight, replace(args, outliers=0.0) if args.kind == "columns" else args).dequantize()

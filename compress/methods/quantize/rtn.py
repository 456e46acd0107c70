"""RTN: round every weight to the nearest one of its kind, such as a point of its grid. No calibration: the baseline."""

from dataclasses import replace
from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....kernels.tensor import BlockTensor, Compressed, CompressedTensor, of_grid
from ....kernels.tensor.grid import Grid
from ....recipes.methods import Method, Needs
from ....recipes.scheme import QuantArgs, Scheme, kinds
from ...block import Block


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RTN:
    """Options of rounding to nearest: those of its scheme."""

    scheme: Scheme = Scheme()
    needs: ClassVar[Needs] = Needs()
    true_sequential: ClassVar[bool] = False


def apply(config: RTN, block: Block) -> None:
    """Compress every linear of the block."""
    for linear in block.linears:
        linear.result = nearest(linear.weight, linear.grid_args)


def nearest(weight: Tensor, args: QuantArgs) -> Compressed:
    """The nearest weight to `weight` `[out, in]` of the kind that `args` ask for, without a low-rank term.

    Raises `UsageError` if the kind is not found by rounding.
    """
    codes = replace(args, rank=0)
    return kinds.kind_of(codes).round(weight, codes)


def round_to_nearest(
    weight: Tensor, args: QuantArgs, importance: Tensor | None = None
) -> CompressedTensor | BlockTensor:
    """`weight` `[out, in]` rounded to nearest. `importance` `[in]` weights the errors of grids with observer `mse`."""
    grid = Grid.fit(weight, args, importance)
    return of_grid(grid.quantize(weight), grid)


def rounded(weight: Tensor, args: QuantArgs) -> Tensor:
    """`weight` `[out, in]` after rounding to nearest, for any kind of `args`; 16-bit outliers are rounded too."""
    return nearest(weight, replace(args, outliers=0.0)).dequantize(weight.dtype)


METHOD = Method(RTN, apply, scheme=Scheme())

"""ZeroQuant (Yao et al. 2022): group-wise rounding to nearest; its accuracy comes from small groups and from LKD.

The published groups are runs of the flattened matrix that span several output rows; `runs` is their number. The checkpoint
then stores one scale per row, equal within a run. Mixed precision (W4/8) is written as a recipe's `overrides`.
"""

from typing import ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....errors import UsageError
from ....kernels.tensor import CompressedTensor
from ....kernels.tensor.grid import Grid, fit_groups
from ....recipes.scheme import QuantArgs, Scheme
from ...block import Block


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ZeroQuant:
    """Options of ZeroQuant.

    The published grids are those of formula `ds`, which clips the largest weight by one step; `signed` does not.

    runs  number of groups that the flattened matrix of a layer is divided into, for a scheme with strategy `channel`: the
          published BERT models use 48, the GPT models 64. 0: the groups of the scheme
    """

    scheme: Scheme = Scheme(QuantArgs(bits=8, formula="signed"))
    runs: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.runs < 0:
            raise UsageError(f"runs must be at least 0, got {self.runs}", "use for example 64, or 0")
        if self.runs and self.scheme.weights.strategy != "channel":
            raise UsageError(
                f"runs requires strategy channel, got {self.scheme.weights.strategy}", "use --group-size -1 with runs"
            )


def apply(config: ZeroQuant, block: Block) -> None:
    """Quantize every linear of the block."""
    for linear in block.linears:
        linear.result = quantize(linear.weight, linear.grid_args, config.runs, linear.name)


def quantize(weight: Tensor, args: QuantArgs, runs: int = 0, name: str = "the layer") -> CompressedTensor:
    """`weight` `[out, in]` rounded to nearest. Raises `UsageError` if `runs` does not divide its rows."""
    grid = _fit_runs(weight, args, runs, name) if runs else Grid.fit(weight, args)
    # If all values have one sign, zero lies outside the codes, which no format can store: clamp it to the nearest code.
    grid = Grid(grid.scale, grid.zero.clamp(0, args.maxq), args)
    return CompressedTensor.from_grid(grid.quantize(weight), grid)


def _fit_runs(weight: Tensor, args: QuantArgs, runs: int, name: str) -> Grid:
    rows = len(weight)
    if rows % runs:
        raise UsageError(f"runs={runs} does not divide the {rows} rows of {name}", "use a divisor, or runs=0")
    scale, zero = fit_groups(weight.reshape(runs, -1), args)
    run = torch.arange(runs, device=weight.device).repeat_interleave(rows // runs)
    return Grid(scale[run].unsqueeze(1), zero[run].unsqueeze(1), args)

"""OBQ (Frantar et al. 2022): quantize every row weight by weight, the one with the least loss first; the rest of the row
compensates each error.

The grid is fitted beforehand. With pruning, ExactOBS prunes first; each row then has its own Hessian without its pruned
columns, so that zeros stay zero. Costs `O(in^3)` per row.
"""

from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....errors import UsageError
from ....kernels.tensor import BlockTensor, CompressedTensor, of_grid
from ....kernels.tensor.grid import Grid
from ....recipes.scheme import PruneArgs, QuantArgs, Scheme
from ...block import Block
from ...solver.damped_hessian import DampedHessian, damp
from ...solver.loss import layer_loss
from ...solver.obs_elimination import BATCH_BYTES, GridProjection, eliminate
from ..prune import exactobs
from .fallback import keep_better

Order = Literal["greedy", "act", "fixed"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OBQ:
    """Options of OBQ.

    damping  added to the Hessian's diagonal, relative to its mean; raised tenfold until it can be inverted
    order    least loss first, separately for each row (`greedy`, as published); by falling Hessian diagonal (`act`: sensitive
             columns come first, while other columns can still compensate their errors); or as stored (`fixed`)
    pruning  prune by ExactOBS first, to this sparsity; zeros are codes of the grid like all other values
    """

    scheme: Scheme = Scheme()
    damping: float = 0.0
    order: Order = "greedy"
    pruning: PruneArgs | None = None
    true_sequential: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        if self.pruning is not None and self.scheme.weights.formula in ("awq", "spqr", "ggml"):
            raise UsageError(
                f"pruning needs a grid that contains zero, which formula={self.scheme.weights.formula} does not guarantee",
                "use formula=gptq",
            )


def apply(config: OBQ, block: Block) -> None:
    """Quantize every linear of the block."""
    for linear in block.linears:
        assert linear.hessian is not None
        hessian = linear.hessian.matrix()
        solved = damp(hessian, config.damping)
        weight = linear.weight.double().masked_fill(solved.dead, 0)
        pruned = None
        if config.pruning is not None:
            weight, pruned = exactobs.prune(weight, solved, config.pruning)
            linear.figures["sparsity"] = float(pruned.double().mean())
        linear.result = quantize(weight, solved, linear.grid_args, config.order, pruned)
        linear.figures |= {"damping": solved.damping, "dead_columns": int(solved.dead.sum())}
        if pruned is None:
            keep_better(linear, hessian)
            continue
        loss, energy = (
            layer_loss(delta, hessian.double())
            for delta in (linear.weight.double() - linear.result.dequantize(torch.float64), linear.weight.double())
        )
        linear.figures |= {"loss": loss, "relative_error": (loss / energy) ** 0.5 if energy > 0 else 0.0}


def quantize(
    weight: Tensor, hessian: DampedHessian, args: QuantArgs, order: Order = "greedy", pruned: Tensor | None = None
) -> CompressedTensor | BlockTensor:
    """Quantize `weight` `[out, in]` float64 with `hessian`; weights that are `pruned` (bool `[out, in]`) stay zero."""
    grid = Grid.fit(weight, args)
    energy = hessian.energy
    rank = {
        "greedy": None,
        "act": energy.argsort(descending=True, stable=True).argsort(),
        "fixed": torch.arange(len(energy), device=energy.device),
    }[order]
    projection = GridProjection(grid, rank)
    if pruned is None:
        quantized = eliminate(weight, hessian.inverse, projection).settled
    else:
        quantized = _eliminate_unpruned(weight, hessian.matrix, grid, rank, ~pruned)
    return of_grid(grid.quantize(quantized), grid)


def _eliminate_unpruned(weight: Tensor, matrix: Tensor, grid: Grid, rank: Tensor | None, kept: Tensor) -> Tensor:
    """The quantized weights `[out, in]`; every row has its own inverse, that of the Hessian without its pruned columns."""
    step = max(1, BATCH_BYTES // (matrix.numel() * matrix.element_size()))
    parts = []
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        own = matrix * kept[rows].unsqueeze(1) * kept[rows].unsqueeze(2)
        own.diagonal(dim1=1, dim2=2).add_((~kept[rows]).to(matrix.dtype))
        own_grid = Grid(grid.scale[rows], grid.zero[rows], grid.args) if len(grid.scale) > 1 else grid
        parts.append(eliminate(weight[rows], torch.linalg.inv(own), GridProjection(own_grid, rank)).settled)
    return torch.cat(parts)

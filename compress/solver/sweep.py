"""The fixed-order column sweep shared by GPTQ, SparseGPT and SpQR.

Columns are settled one after another; the columns after each compensate its error (GPTQ, section 3).
Everything is held transposed, so that a column of the layer is a contiguous row in memory.
"""

from typing import Protocol

import torch
from torch import Tensor

BLOCK = 128  # columns updated one by one before the rest of the matrix is updated by one product


class Projection(Protocol):
    """What a column becomes. `span` columns share parameters, which `fit` sets when the first of them is reached.

    `span` None: all parameters are fixed before the sweep.
    """

    @property
    def span(self) -> int | None: ...

    def fit(self, start: int, columns: Tensor) -> None:
        """Set the parameters of columns `start ..` from their current, compensated values `columns` `[span, out]`."""
        ...

    def column(self, index: int, column: Tensor) -> Tensor:
        """The settled value of column `index`, given its current value `[out]`."""
        ...


def sweep(
    weight: Tensor, upper: Tensor, projection: Projection, block: int = BLOCK, target: Tensor | None = None
) -> Tensor:
    """Settle all columns of `weight` `[in, out]` (transposed, in processing order) in place.

    `upper` `[in, in]` is the factor `U` with `Hd^-1 = U^T U`. On return `weight` holds the settled values `Q^T`.
    Returns the scaled errors `E^T` `[in, out]`; identity I1: `W - Q = E U` and `sum(E**2) / 2` is the damped loss.
    With `target` `A` `[in, out]` the weight that is approximated, and whose errors are returned, is `W + A^T U`.
    """
    columns = weight.shape[0]
    errors = torch.empty_like(weight)
    diagonal = upper.diagonal().tolist()
    for start in range(0, columns, step := _block_size(block, projection.span, columns)):
        stop = min(start + step, columns)
        for i in range(start, stop):
            if projection.span and i % projection.span == 0:
                span = slice(i, i + projection.span)
                lead = 0 if target is None else upper[span, span].T @ target[span]
                projection.fit(i, weight[span] + lead)
            wanted = weight[i] if target is None else torch.add(weight[i], target[i], alpha=diagonal[i])
            settled = projection.column(i, wanted)
            error = torch.sub(weight[i], settled, out=errors[i]).div_(diagonal[i])
            weight[i].copy_(settled)
            weight[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        weight[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return errors if target is None else errors.add_(target)


def _block_size(block: int, span: int | None, columns: int) -> int:
    """A block never ends inside a span, so that `fit` always sees fully compensated columns."""
    if span is None or block % span == 0:
        return block
    return span * max(1, min(block, columns) // span)

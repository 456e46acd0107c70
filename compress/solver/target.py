"""Asymmetric calibration (GPTAQ, Li et al. 2025): a layer approximates the original model's output on the inputs that the
compressed model gives it, instead of its own output on them.

With the drift `G` (calibrate/statistics/drift.py) and the share of it that is compensated, the target weight is
`T = W + share * G Hd^-1`. With `Hd^-1 = U^T U` that is `T = W + A^T U`, `A = share * U G^T`: the sweep reads `A` column by
column, so that `T` need not be computed. The loss of a solution `Q` by the damped Hessian is

    1/2 tr((T-Q) Hd (T-Q)^T) = 1/2 tr((W-Q) Hd (W-Q)^T) + share * tr((W-Q) G^T) + 1/2 |A|^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .factor import transposed_times_, upper_times_

ROWS = 512  # of the drift that are transposed at a time, to save memory


@dataclass(frozen=True)
class AsymmetricTarget:
    """`drift` `G` `[out, in]`, `share`, and `errors` `A` `[in, out]` in the order of the sweep; `rest` is `|A|^2 / 2`."""

    drift: Tensor
    share: float
    errors: Tensor
    rest: float

    @classmethod
    def of(cls, drift: Tensor, share: float, upper: Tensor, order: Tensor) -> "AsymmetricTarget":
        """The target for a sweep with the factor `upper` `[in, in]`, whose dtype it takes, and columns in `order` `[in]`."""
        errors = upper.new_empty(drift.shape[1], drift.shape[0])
        for rows, columns in zip(drift.split(ROWS), errors.split(ROWS, dim=1), strict=True):
            columns.copy_(rows[:, order].T)
        upper_times_(upper, errors).mul_(share)
        return cls(drift, share, errors, half_square(errors))

    def weight(self, weight: Tensor, upper: Tensor, order: Tensor) -> Tensor:
        """`T` `[out, in]` for `weight` `W`, with the `upper` and the `order` of the target."""
        moved = transposed_times_(upper, self.errors.clone())[order.argsort()]
        return moved.T.add_(weight)

    def excess(self, delta: Tensor) -> float:
        """What the target `T` instead of `W` adds to `1/2 tr(D H D^T)` of `delta` `D = W - Q` `[out, in]`."""
        return self.share * float(torch.linalg.vecdot(delta, self.drift.to(delta.dtype)).double().sum()) + self.rest


def half_square(errors: Tensor) -> float:
    """`sum(E**2) / 2`: the damped loss of a sweep with the scaled errors `errors` `[in, out]`."""
    return float(torch.linalg.vector_norm(errors, dim=1).double().square().sum()) / 2

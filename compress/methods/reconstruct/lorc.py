"""LoRC (ZeroQuant-V2, Yao et al. 2023): a low-rank term added to a quantized weight compensates the quantization error.

The published method uses the singular vectors of `E = W - Q`. The layer's loss is `|| X (E - A B)^T ||^2`; with
`H = 2/N X^T X`, its minimum needs neither a root nor an inverse of the Hessian:

    A  the leading eigenvectors of  E H E^T  [out, rank],      B = A^T E

For orthonormal A, `tr((E - A B) H (E - A B)^T)` is smallest at `B = A^T E`, and is then the part of `tr(E H E^T)` outside the
span of A.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....errors import UsageError
from ....kernels.tensor import LowRankTensor
from ....recipes.methods import Method, Needs
from ....recipes.scheme import PruneArgs, QuantArgs
from ...block import Block
from ...solver.loss import layer_loss

EXACT_ROWS = 1024  # up to this number of rows, all eigenvectors are computed
OVERSAMPLING, ITERATIONS = 8, 16  # of the subspace iteration for more rows


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LoRC:
    """Options of LoRC, for use after any quantizer.

    rank      of the low-rank term, which takes `16 * rank * (out + in)` bits per layer
    weighted  weight errors by the layer's inputs; else use the singular vectors of the error, as published
    """

    rank: int = 8
    weighted: bool = True
    needs: ClassVar[Needs] = Needs(hessian=True, original=True)
    scheme: ClassVar[None] = None
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank must be at least 1, got {self.rank}", "use for example rank=8")


def adapt(config: LoRC, args: QuantArgs, shape: tuple[int, int]) -> QuantArgs:
    """The arguments of a layer of shape `(out, in)` with the rank of its low-rank term."""
    return replace(args, rank=min(config.rank, *shape))


@torch.no_grad()
def apply(config: LoRC, block: Block) -> None:
    """Add a low-rank term to every quantized linear of the block.

    Raises `UsageError` if a linear is pruned or has a low-rank term already.
    """
    for linear in block.linears:
        assert linear.hessian is not None and linear.result is not None
        if isinstance(linear.args, PruneArgs) or isinstance(linear.result, LowRankTensor):
            raise UsageError(
                f"lorc needs a quantized weight without a low-rank term, and {linear.name} is not one",
                "use lorc once, after a quantizer",
            )
        hessian = linear.hessian.matrix()
        error = linear.weight - linear.result.dequantize(linear.weight.dtype)
        left, right = low_rank(
            error, hessian if config.weighted else torch.eye(len(hessian)).to(hessian), linear.grid_args.rank
        )
        codes: Any = linear.result
        base = replace(codes, args=replace(codes.args, rank=0))
        linear.result = LowRankTensor(base, left, right)
        before, after = layer_loss(error, hessian), layer_loss(error - left.float() @ right.float(), hessian)
        linear.figures |= {"uncompensated_loss": before, "loss": after}


def low_rank(error: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors `A` `[out, rank]` and `B` `[rank, in]`, float16, whose product is nearest to `error` `[out, in]` in the norm
    of `hessian` `[in, in]`.

    The norms of both factors are balanced, and B is fitted to A as rounded to float16.
    """
    basis = leading_eigenvectors(error, hessian, rank).double()
    size = (basis.T @ error.double()).norm(dim=1).sqrt()
    left = (basis * size).half()
    right = torch.linalg.pinv(left.double()) @ error.double()
    return left, right.half()


def leading_eigenvectors(error: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of `error hessian error^T`, orthonormal columns `[out, rank]`.

    Exact for up to `EXACT_ROWS` rows; above by subspace iteration, whose subspace may differ if eigenvalues are close, but
    then has nearly the same loss.
    """
    if len(error) <= EXACT_ROWS:
        wide = error.double()
        return torch.linalg.eigh(wide @ hessian.double() @ wide.T).eigenvectors.flip(1)[:, :rank]
    start = torch.randn(len(error), 2 * rank + OVERSAMPLING, generator=torch.Generator().manual_seed(0)).to(error)
    basis = torch.linalg.qr(start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(error @ (hessian @ (error.T @ basis))).Q
    inside = error.T @ basis
    return basis @ torch.linalg.eigh(inside.T @ (hessian @ inside)).eigenvectors.flip(1)[:, :rank]


METHOD = Method(LoRC, apply, kinds=None, adapt=adapt)

"""LoRC (ZeroQuant-V2, Yao et al. 2023): a product of two narrow matrices makes up for what a quantizer has lost.

The published method takes the singular vectors of `E = W - Q`. What counts is `|| X (E - A B)^T ||`, and its minimum needs no
root of the Hessian and no inverse: with H = 2/N X^T X,

    A  the leading eigenvectors of  E H E^T  [out, rank],      B = A^T E

as `tr((E - A B) H (E - A B)^T)` is smallest in B where `A A^T` projects E, and is then what A leaves of `tr(E H E^T)`.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....errors import UsageError
from ....kernels.tensor import LowRankTensor
from ....recipes.scheme import PruneArgs, QuantArgs
from ...block import Block
from ...solver.loss import layer_loss

EXACT = 1024  # rows up to which all eigenvectors are computed
EXTRA, ITERATIONS = 8, 16  # of the subspace iteration above


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LoRC:
    """Options of LoRC, for use after any quantizer.

    rank      of the product: `16 * rank * (out + in)` bits a layer
    weighted  weigh errors by the layer's inputs; else plain singular vectors, as published
    """

    rank: int = 8
    weighted: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "original"})
    scheme: ClassVar[None] = None
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank {self.rank} compensates nothing", "use for example rank=8")


def adapt(config: LoRC, args: QuantArgs, shape: tuple[int, int]) -> QuantArgs:
    """The arguments of a layer `(out, in)` with the rank that its term will have."""
    return replace(args, rank=min(config.rank, *shape))


@torch.no_grad()
def apply(config: LoRC, block: Block) -> None:
    """Add a low-rank term to every quantized linear of the block."""
    for linear in block.linears:
        assert linear.hessian is not None and linear.result is not None
        if isinstance(linear.args, PruneArgs) or isinstance(linear.result, LowRankTensor):
            raise UsageError(f"{linear.name} has nothing for lorc to add to", "put it once, after a quantizer")
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
    """The factors `A` `[out, rank]` and `B` `[rank, in]`, float16, whose product is nearest to `error` under `hessian`.

    The sizes of both are balanced, and B is fitted anew to the A that is stored.
    """
    basis = leading(error, hessian, rank).double()
    size = (basis.T @ error.double()).norm(dim=1).sqrt()
    left = (basis * size).half()
    right = torch.linalg.pinv(left.double()) @ error.double()
    return left, right.half()


def leading(error: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of `error hessian error^T`, orthonormal columns `[out, rank]`.

    Exact for few rows; for many by subspace iteration, which finds a subspace as good where it does not find the same.
    """
    if len(error) <= EXACT:
        wide = error.double()
        return torch.linalg.eigh(wide @ hessian.double() @ wide.T).eigenvectors.flip(1)[:, :rank]
    start = torch.randn(len(error), 2 * rank + EXTRA, generator=torch.Generator().manual_seed(0)).to(error)
    basis = torch.linalg.qr(start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(error @ (hessian @ (error.T @ basis))).Q
    inside = error.T @ basis
    return basis @ torch.linalg.eigh(inside.T @ (hessian @ inside)).eigenvectors.flip(1)[:, :rank]

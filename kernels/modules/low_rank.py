"""The module of a quantized weight with a low-rank term (LoRC)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..tensor import LowRankTensor


class LowRankLinear(nn.Module):
    """`y = inner(x) + x right^T left^T`: `inner` computes the product with the quantized weight and adds the bias.

    The term multiplies the inputs as they are, even if `inner` rounds them.
    """

    def __init__(self, inner: nn.Module, tensor: LowRankTensor) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.inner = inner
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", tensor.left, persistent=False)
        self.register_buffer("right", tensor.right, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.left.shape[1]}"

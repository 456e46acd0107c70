"""Layers and tables that are not quantized, in the 16 bits that they are stored in, for models that compute in float32.

The compiled kernels multiply by them as they are stored: half of the memory of float32, and the same products. A head and
a table of embeddings that are tied hold one copy.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...recipes.scheme.prune_args import FloatDtype, PruneArgs
from .. import dispatch
from ..kernel import KernelSpec, PrunedProduct
from ..reference import REFERENCE
from ..tensor import PrunedTensor
from .linear import PrunedLinear, Serving

NARROW: dict[torch.dtype, FloatDtype] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
HELD = (nn.Linear, nn.Embedding)


def can_hold(module: nn.Module, stored: torch.dtype, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer or table that is `stored` in this dtype can stay so if the model computes in `dtype` on `device`."""
    fits = type(module) in HELD and stored in NARROW and dtype == torch.float32 and device.type == "cpu"
    return fits and dispatch.choose(KernelSpec.pruned(stored)).kernel is not REFERENCE


class DenseLinear(PrunedLinear):
    """`y = x W^T + bias` with `W` in 16 bits: nothing of it is pruned."""

    is_packed = False

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        args, kept = PruneArgs(sparsity=0, dtype=NARROW[weight.dtype]), torch.ones_like(weight, dtype=torch.bool)
        super().__init__(PrunedTensor(weight, kept, args), bias, Serving(dtype=dtype))

    @property
    def rows(self) -> Tensor:
        """The weight `[out, in]` as it is held."""
        assert isinstance(self.product, PrunedProduct)
        return self.product.values.view(self.out_features, self.in_features)


class DenseEmbedding(nn.Module):
    """Rows of a table `[rows, width]` that is held in 16 bits; the output is in `dtype`."""

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows.shape
        self.rows: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rows).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.rows.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DenseEmbedding":
        """Moves and casts change the device and the dtype of the output; what is stored keeps its dtype."""
        place = fn(torch.empty(0, dtype=self.dtype, device=self.rows.device))
        self.rows, self.dtype = self.rows.to(place.device), place.dtype
        return self


def hold(model: nn.Module, names: list[str], weight: Tensor, dtype: torch.dtype) -> None:
    """Put modules that hold one copy of `weight` at the dotted `names` of layers and tables, which all are tied to it."""
    modules = {name: model.get_submodule(name) for name in names}
    for name in sorted(names, key=lambda each: isinstance(modules[each], nn.Embedding)):
        old, (parent, _, leaf) = modules[name], name.rpartition(".")
        new = DenseLinear(weight, old.bias, dtype) if isinstance(old, nn.Linear) else DenseEmbedding(weight, dtype)
        weight = new.rows
        setattr(model.get_submodule(parent), leaf, new)

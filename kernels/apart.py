"""What a weight keeps apart from its codes, served around any kernel: 16-bit columns (LLM.int8) and sparse residuals (SpQR)."""

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers the operators)
from .cpu import library
from .kernel import Kernel, Need, Product, Unavailable
from .weight import Weight


def prepare(kernel: Kernel, weight: Weight, need: Need) -> Product:
    """The product of `weight` by `kernel`, with whatever the weight keeps apart."""
    product = kernel.prepare(weight, need)
    if weight.columns is not None and weight.outliers is not None:
        product = WithColumns(product, weight.columns, weight.outliers)
    if weight.residual is not None:
        product = WithResidual(product, weight.residual)
    return product


class WithColumns(Product):
    """`y = x' W^T + x[:, columns] outliers^T`, where x' is x with these columns set to zero: they widen no int8 scale."""

    def __init__(self, inner: Product, columns: Tensor, outliers: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.columns: Tensor
        self.outliers: Tensor
        self.register_buffer("columns", columns, persistent=False)
        # float32: they are few, and converting them would cost each call more than multiplying them
        self.register_buffer("outliers", outliers.float().T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.index_fill(1, self.columns, 0)).float()
        return torch.addmm(y, x.index_select(1, self.columns).float(), self.outliers).to(x.dtype)

    def codes(self) -> Tensor:
        return self.inner.codes()


class WithResidual(Product):
    """`y = x W^T + x S^T` with S sparse, in compressed rows."""

    def __init__(self, inner: Product, residual: Tensor) -> None:
        super().__init__()
        self.inner, self.width = inner, residual.shape[1]
        self.starts: Tensor
        self.indices: Tensor
        self.values: Tensor
        self.register_buffer("starts", residual.crow_indices().to(torch.int64), persistent=False)
        self.register_buffer("indices", residual.col_indices().to(torch.int32), persistent=False)
        self.register_buffer("values", residual.values().float(), persistent=False)
        self.compiled = residual.device.type == "cpu" and _has_library()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.compiled and torch.compiler.is_compiling():
            return torch.ops.lmpress.cpu_add_sparse(y, x, self.starts, self.indices, self.values)
        if self.compiled:
            total = y.float().contiguous()
            library.add_sparse(total, x.detach().float().contiguous(), self.starts, self.indices, self.values)
            return total.to(x.dtype)
        shape = (len(self.starts) - 1, self.width)
        residual = torch.sparse_csr_tensor(self.starts, self.indices.long(), self.values, shape)
        return (y.float() + (residual @ x.float().T).T).to(x.dtype)

    def codes(self) -> Tensor:
        return self.inner.codes()


def _has_library() -> bool:
    try:
        library.library()
    except Unavailable:
        return False
    return True

"""Additions to the product of any kernel: 16-bit columns, the threshold of inputs (LLM.int8), sparse residuals (SpQR)."""

from collections.abc import Callable

import torch
from torch import Tensor

from .kernel import CodedProduct, Kernel, KernelSpec, Product
from .weight import PrunedWeight, SparseRows, Weight


def prepare(kernel: Kernel, weight: Weight | PrunedWeight, need: KernelSpec) -> Product:
    """The product of `weight` by `kernel`, with its outlier columns, threshold and residual."""
    if isinstance(weight, PrunedWeight):
        assert kernel.pruned is not None
        return kernel.pruned(weight, need)
    product = kernel.prepare(weight, need)
    if weight.columns is not None and weight.outliers is not None and not kernel.mixes:
        product = WithColumns(product, weight.columns, weight.outliers)
    if weight.threshold:
        product = WithThreshold(product, weight)
    if weight.residual is not None:
        product = WithResidual(product, weight.residual, weight.shape[1], kernel.added)
    return product


class WithColumns(CodedProduct):
    """`y = x' W^T + x[:, columns] outliers^T`, where x' is x with these columns set to zero: they widen no int8 scale."""

    def __init__(self, inner: CodedProduct, columns: Tensor, outliers: Tensor) -> None:
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


class WithThreshold(CodedProduct):
    """Input columns that reach the threshold are left out of the int8 product, so that they widen none of its scales.

    They are found at every call and multiplied by the dequantized codes (Dettmers et al. 2022). Columns that are stored in 16
    bits are not among them.
    """

    def __init__(self, inner: CodedProduct, weight: Weight) -> None:
        super().__init__()
        self.inner, self.threshold, self.center = inner, weight.threshold, 2 ** (weight.bits - 1)
        self.scale: Tensor
        self.quantized: Tensor
        kept = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.codes.device)
        if weight.columns is not None:
            kept[weight.columns] = False
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("quantized", kept, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        outlying = (x.abs() >= self.threshold).any(0) & self.quantized
        if not bool(outlying.any()):
            return self.inner(x)
        columns = outlying.nonzero()[:, 0]
        weight = (self.codes()[:, columns].float() - self.center) * self.scale.float()
        y = self.inner(x.index_fill(1, columns, 0)).float()
        return torch.addmm(y, x.index_select(1, columns).float(), weight.T).to(x.dtype)

    def codes(self) -> Tensor:
        return self.inner.codes()


class WithResidual(CodedProduct):
    """`y = x W^T + x S^T` with S sparse, in compressed rows, whose product is `added`."""

    def __init__(
        self,
        inner: CodedProduct,
        residual: SparseRows,
        width: int,
        added: Callable[[SparseRows, Tensor, Tensor], Tensor] = SparseRows.added,
    ) -> None:
        super().__init__()
        self.inner, self.added = inner, added
        self.starts: Tensor
        self.indices: Tensor
        self.values: Tensor
        self.register_buffer("starts", residual.starts, persistent=False)
        narrow = residual.values.device.type == "cpu" and width <= torch.iinfo(torch.uint16).max
        indices = residual.columns.to(torch.uint16) if narrow else residual.columns
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("values", residual.values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = SparseRows(self.starts, self.indices, self.values)
        return self.added(residual, self.inner(x).float(), x).to(x.dtype)

    def codes(self) -> Tensor:
        return self.inner.codes()

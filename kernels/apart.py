"""What goes around any kernel: 16-bit columns and the threshold of the inputs (LLM.int8), and sparse residuals (SpQR)."""

from importlib.util import find_spec

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers the operators)
from .cpu import library
from .kernel import CodedProduct, Kernel, Need, Product, Unavailable
from .weight import PrunedWeight, SparseRows, Weight


def prepare(kernel: Kernel, weight: Weight | PrunedWeight, need: Need) -> Product:
    """The product of `weight` by `kernel`, with whatever the weight keeps apart."""
    if isinstance(weight, PrunedWeight):
        assert kernel.pruned is not None
        return kernel.pruned(weight, need)
    product = kernel.prepare(weight, need)
    if weight.columns is not None and weight.outliers is not None and not kernel.mixes:
        product = WithColumns(product, weight.columns, weight.outliers)
    if weight.threshold:
        product = WithThreshold(product, weight)
    if weight.residual is not None:
        product = WithResidual(product, weight.residual, weight.shape[1])
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
    """Input columns that reach the threshold, but for those kept apart, leave the int8 product and widen none of its scales.

    They are found anew at every call and meet the dequantized codes, for want of better weights (Dettmers et al. 2022).
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
        loud = (x.abs() >= self.threshold).any(0) & self.quantized
        if not bool(loud.any()):
            return self.inner(x)
        columns = loud.nonzero()[:, 0]
        weight = (self.codes()[:, columns].float() - self.center) * self.scale.float()
        y = self.inner(x.index_fill(1, columns, 0)).float()
        return torch.addmm(y, x.index_select(1, columns).float(), weight.T).to(x.dtype)

    def codes(self) -> Tensor:
        return self.inner.codes()


class WithResidual(CodedProduct):
    """`y = x W^T + x S^T` with S sparse, in compressed rows."""

    def __init__(self, inner: CodedProduct, residual: SparseRows, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.starts: Tensor
        self.indices: Tensor
        self.values: Tensor
        self.register_buffer("starts", residual.starts, persistent=False)
        on_cpu, narrow = residual.values.device.type == "cpu", width <= torch.iinfo(torch.uint16).max
        indices = residual.columns.to(torch.uint16) if on_cpu and narrow else residual.columns
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("values", residual.values, persistent=False)
        self.compiled = on_cpu and _has_library()
        self.on_gpu = residual.values.is_cuda and find_spec("triton") is not None

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).float()
        traced = torch.compiler.is_compiling() or y.requires_grad
        if self.on_gpu and not traced:
            from .triton.launch import added_sparse

            y = added_sparse(y, x, self.starts, self.indices, self.values)
        elif not self.compiled:
            entries = x.float()[:, self.indices.long()] * self.values
            y = y.index_add(1, SparseRows(self.starts, self.indices, self.values).rows, entries)
        elif traced:
            y = torch.ops.lmpress.cpu_add_sparse(y, x.float(), self.starts, self.indices, self.values)
        else:
            library.add_sparse(y, x.float().contiguous(), self.starts, self.indices, self.values)
        return y.to(x.dtype)

    def codes(self) -> Tensor:
        return self.inner.codes()


def _has_library() -> bool:
    try:
        library.library()
    except Unavailable:
        return False
    return True

"""Products by the Triton kernels, for GPUs. Triton is imported when the first product runs, not before."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ..kernel import Activations, Capabilities, Kernel, KernelSpec, Unavailable, WrongMachine
from ..packed_layout import PackedLayout, flatten_layout
from ..weight import SparseRows, Weight
from .layout import Tiles, pack, unpack

# The seconds that a call of one of the products takes with this input.
Seconds = Callable[[Sequence[Callable[[Tensor], Tensor]], Tensor], float]

OLDEST = (8, 0)  # compute capability of the first GPUs with bfloat16


class TritonProduct(PackedLayout[Tiles]):
    """A weight in parts (see `layout.py`)."""

    def __init__(self, weight: Weight, spec: KernelSpec) -> None:
        _check(weight, spec)
        super().__init__(pack(weight, int8=spec.activations != "float"))
        self.given_bits, self.steps = weight.bits, spec.steps
        self.activations: Activations = spec.activations

    def forward(self, x: Tensor) -> Tensor:
        from . import launch, ops  # noqa: F401  (registers the operator)

        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return torch.ops.lmpress.triton_linear(x, *flatten_layout(self.layout), self.activations, self.steps)
        return launch.multiply(x, self.layout, self.activations, self.steps)

    def codes(self) -> Tensor:
        return unpack(self.layout, self.given_bits)


def added_sparse(residual: SparseRows, y: Tensor, x: Tensor) -> Tensor:
    """`y + x S^T` for float32 `y` `[m, rows]` and `x` `[m, columns]` of any float dtype."""
    from . import launch

    if torch.compiler.is_compiling() or y.requires_grad:
        return residual.added(y, x)
    return launch.added_sparse(y, x, residual.starts, residual.columns, residual.values)


def tune_tiles(products: Sequence[TritonProduct], inputs: Sequence[int], dtype: torch.dtype, seconds: Seconds) -> None:
    """Find and store the fastest tiles of `products` on this GPU, for each number of rows in `inputs` (see tune.py)."""
    from .tune import tune

    tune(products, inputs, dtype, seconds)


def _check(weight: Weight, spec: KernelSpec) -> None:
    """Raises `Unavailable` if Triton is missing, `WrongMachine` if it does not support the GPU or has no kernel for `spec`."""
    if find_spec("triton") is None:
        raise Unavailable("triton is not installed: pip install triton")
    if weight.codebook is not None and spec.activations != "float":
        raise WrongMachine(f"codebooks with int8 activations ({spec.activations}) are not supported")
    if weight.codes.is_cuda and torch.cuda.get_device_capability(weight.codes.device) < OLDEST:
        raise WrongMachine("the GPU must have compute capability 8.0 or later")


TRITON = Kernel(
    name="triton",
    serves=Capabilities(
        bits=frozenset(range(2, 9)),
        codebook_bits=frozenset({2, 3, 4}),
        activations=frozenset({"float", "group", "token"}),
        devices=frozenset({"cuda"}),
    ),
    prepare=TritonProduct,
    added=added_sparse,
)

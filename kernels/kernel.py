"""What a kernel is: what it serves, as data, and how a weight is prepared for it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import CompressError
from .weight import PrunedWeight, SparseRows, Weight

Activations = Literal["float", "group", "token"]
Part = Literal["levels", "columns", "residual"]
PARTS: tuple[Part, ...] = ("levels", "columns", "residual")

STEPS = 127.0
FLOAT_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


class Unavailable(CompressError):
    """A kernel cannot run on this machine; the message gives the reason. The dispatch then tries the next one."""


class WrongMachine(Unavailable):
    """The kernel was made for other hardware: there is nothing to repair, and no warning is given."""


@dataclass(frozen=True)
class KernelSpec:
    """What a layer needs of its kernel.

    `values` is the dtype of what a pruned weight stores, and then `bits` are those of the dtype and there is no grid; None for
    codes. `activations` is how inputs enter the product: `float` as they are (exact), `group` as int8 codes with a scale per
    row and group of the weight, `token` as int8 codes with a scale per row. A scale is `absmax / steps`. `parts` are those
    of `Weight` that this one has in addition to its codes, scales and zeros, in the order of `PARTS`.
    """

    bits: int
    group: int
    symmetric: bool = True
    codebook: bool = False
    activations: Activations = "float"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    steps: float = STEPS
    values: torch.dtype | None = None
    parts: tuple[Part, ...] = ()

    @classmethod
    def of(
        cls,
        weight: Weight | PrunedWeight,
        activations: Activations = "float",
        dtype: torch.dtype = torch.float32,
        steps: float = STEPS,
    ) -> "KernelSpec":
        """What `weight` needs, for inputs of `dtype` on the weight's device; those of a pruned weight stay floats."""
        if isinstance(weight, PrunedWeight):
            return cls.pruned(weight.values.dtype, weight.values.device.type, dtype)
        device, codebook = weight.codes.device.type, weight.codebook is not None
        parts: tuple[Part, ...] = tuple(part for part in PARTS if getattr(weight, part) is not None)
        symmetric = weight.zero is None
        return cls(weight.bits, weight.group, symmetric, codebook, activations, device, dtype, steps, parts=parts)

    @classmethod
    def pruned(cls, values: torch.dtype, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "KernelSpec":
        """What a pruned weight needs that stores `values`."""
        return cls(torch.finfo(values).bits, group=1, device=device, dtype=dtype, values=values)


@dataclass(frozen=True)
class Capabilities:
    """The needs that a kernel meets; None stands for any device, any dtype, any number of columns per scale.

    `bits` are those of codes, `codebook_bits` those of codes with a codebook, `values` the dtypes of pruned weights (most
    kernels: none).
    """

    bits: frozenset[int]
    activations: frozenset[Activations]
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = FLOAT_DTYPES
    groups: frozenset[int] | None = None
    symmetric: frozenset[bool] = frozenset({True, False})
    codebook_bits: frozenset[int] = frozenset()
    values: frozenset[torch.dtype] = frozenset()

    def refusal(self, need: KernelSpec) -> str | None:
        """Why `need` is not met, or None if it is."""
        if need.values is not None:
            stored = ("values", need.values, self.values)
        else:
            stored = (
                ("codebook bits", need.bits, self.codebook_bits) if need.codebook else ("bits", need.bits, self.bits)
            )
        needs = [
            stored,
            ("activations", need.activations, self.activations),
            ("device", need.device, self.devices),
            ("dtype", need.dtype, self.dtypes),
            ("group", need.group, self.groups),
            ("symmetric", need.symmetric, self.symmetric),
        ]
        return next(
            (f"{what} {value} not served" for what, value, ok in needs if ok is not None and value not in ok), None
        )


class Product(nn.Module, ABC):
    """A weight in a kernel's layout: `forward` is `y = x W^T` for `x` `[m, in]`, in the dtype of `x`.

    Its tensors are buffers, so it moves and is traced as any module; none of them is ever stored.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """y `[m, out]`"""


class CodedProduct(Product):
    """The product of a weight of codes, which it can return, so that they are kept in memory once."""

    @abstractmethod
    def codes(self) -> Tensor:
        """The codes uint8 `[out, in]` that were given."""

    def held_scale(self) -> Tensor | None:
        """The scales `[out, groups]` that were given, in a float dtype that holds them exactly; None if they are gone."""
        return None


class PrunedProduct(Product):
    """The product of a pruned weight, which it keeps as it was given: `mask`, `values` (see `PrunedWeight`)."""

    def __init__(self, weight: PrunedWeight) -> None:
        super().__init__()
        self.width = weight.width
        self.mask: Tensor
        self.values: Tensor
        self.register_buffer("mask", weight.mask, persistent=False)
        self.register_buffer("values", weight.values, persistent=False)

    @property
    def weight(self) -> PrunedWeight:
        """What was given."""
        return PrunedWeight(self.mask, self.values, self.width)


@dataclass(frozen=True)
class Kernel:
    """A named way to multiply by a quantized weight.

    `prepare` makes the product of a weight and raises `Unavailable` if the machine cannot run it; `pruned` does the same for
    a pruned weight, if `serves` has `values`. `mixes`: it multiplies 16-bit columns too; `added` is how it adds the
    product of a residual to float32 sums, perhaps in place. `tolerance` is the largest relative error against float64 (with the
    activations quantized as the need says) that its self-test accepts.
    """

    name: str
    serves: Capabilities
    prepare: Callable[[Weight, KernelSpec], CodedProduct]
    tolerance: float = 1e-5
    pruned: Callable[[PrunedWeight, KernelSpec], PrunedProduct] | None = None
    mixes: bool = False
    added: Callable[[SparseRows, Tensor, Tensor], Tensor] = SparseRows.added

"""Products by the Triton kernels, which GPUs compile. Triton is imported when a layer is prepared, not before."""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..kernel import Activations, Kernel, Need, Product, Serves, Unavailable, WrongMachine
from ..weight import Weight
from .layout import Tiles, pack, unpack

OLDEST = (8, 0)  # the first GPUs with bfloat16
WIDEST_TABLE = 4  # bits of a codebook's codes


class TritonProduct(Product):
    """A weight in parts (see `layout.py`)."""

    def __init__(self, weight: Weight, need: Need) -> None:
        super().__init__()
        _check(weight, need)
        tiles = pack(weight, int8=need.activations != "float")
        self.given_bits, self.steps = weight.bits, need.steps
        self.activations: Activations = need.activations
        self.rows, self.columns, self.group = tiles.rows, tiles.columns, tiles.group
        self.bits, self.width, self.real = tiles.bits, tiles.width, tiles.real
        self.low: Tensor
        self.high: Tensor | None
        self.scales: Tensor
        self.zeros: Tensor | None
        self.table: Tensor | None
        self.register_buffer("low", tiles.low, persistent=False)
        self.register_buffer("high", tiles.high, persistent=False)
        self.register_buffer("scales", tiles.scales, persistent=False)
        self.register_buffer("zeros", tiles.zeros, persistent=False)
        self.register_buffer("table", tiles.table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        from . import launch, ops  # noqa: F401  (registers the operator)

        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            tensors = (self.low, self.high, self.scales, self.zeros, self.table)
            shape = (self.rows, self.columns, self.group, self.bits, self.width, self.real)
            return torch.ops.lmpress.triton_linear(x, *tensors, *shape, self.activations, self.steps)
        return launch.multiply(x, self.tiles, self.activations, self.steps)

    @property
    def tiles(self) -> Tiles:
        """The weight as the kernels read it."""
        return Tiles(
            self.low, self.high, self.scales, self.zeros, self.table,
            self.rows, self.columns, self.group, self.bits, self.width, self.real,
        )  # fmt: skip

    def codes(self) -> Tensor:
        return unpack(self.tiles, self.given_bits)


def _check(weight: Weight, need: Need) -> None:
    """Raises `Unavailable` where Triton or a GPU that it compiles for is missing, and for what it has no kernel for."""
    if find_spec("triton") is None:
        raise Unavailable("triton is not installed: pip install triton")
    if weight.codebook is not None and (weight.bits > WIDEST_TABLE or need.activations != "float"):
        raise WrongMachine(f"codebooks of {weight.bits} bits and {need.activations} inputs are not served")
    if weight.codes.is_cuda and torch.cuda.get_device_capability(weight.codes.device) < OLDEST:
        raise WrongMachine("this GPU is older than compute capability 8.0")


TRITON = Kernel(
    name="triton",
    serves=Serves(
        bits=frozenset(range(2, 9)),
        activations=frozenset({"float", "group", "token"}),
        devices=frozenset({"cuda"}),
    ),
    prepare=TritonProduct,
)

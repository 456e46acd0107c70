"""The contracts of the operators: schemas, shapes for tracing, gradients."""

import pytest
import torch

from lmpress.kernels import ops
from lmpress.kernels.cpu import library
from lmpress.kernels.cpu.layout import pack
from lmpress.kernels.kernel import Unavailable
from lmpress.kernels.packed_layout import flatten_layout
from lmpress.kernels.weight import SparseRows, Weight


def arguments(x: torch.Tensor, symmetric: bool) -> tuple:
    try:
        name, chosen = next(iter(library.instruction_sets().items()))
    except Unavailable as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (20, 64), generator=generator, dtype=torch.uint8)
    zero = None if symmetric else torch.randint(0, 16, (20, 2), generator=generator, dtype=torch.uint8)
    panels = pack(Weight(codes, torch.rand(20, 2, generator=generator), zero, 4, 32), chosen.lanes)
    return x, *flatten_layout(panels), name, "float", 127.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_linear(symmetric: bool) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    torch.library.opcheck(ops.cpu_linear, arguments(x, symmetric))


def test_transposed_and_sparse() -> None:
    values = arguments(torch.randn(3, 20), False)
    torch.library.opcheck(ops.cpu_linear_transposed, values[:-2])
    sparse = SparseRows.of(torch.eye(6) * torch.arange(6))
    given = (
        torch.randn(2, 6, requires_grad=True),
        torch.randn(2, 6, requires_grad=True),
        sparse.starts,
        sparse.columns,
        sparse.values,
    )
    torch.library.opcheck(ops.cpu_add_sparse, given)

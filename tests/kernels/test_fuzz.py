"""Random layers and inputs through every kernel that serves them, against float64: no wrong number, no crash."""

import os
import random
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lmpress.kernels import dispatch
from lmpress.kernels.kernel import Activations, CodedProduct, Kernel, KernelSpec
from lmpress.kernels.outliers import prepare
from lmpress.kernels.tensor import Bilevel, PrunedTensor
from lmpress.kernels.weight import Levels, PrunedWeight, SparseRows, Weight
from lmpress.recipes.scheme.prune_args import PruneArgs

COLUMNS = [1, 2, 3, 7, 8, 16, 31, 32, 33, 43, 64, 100, 129, 172, 256, 300, 520]
GROUPS = [1, 2, 3, 8, 16, 24, 32, 43, 64, 128, 200, 10_000]
BATCHES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 33, 63, 64, 65, 130]
DTYPES = [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]
each_kernel = pytest.mark.parametrize("kernel", dispatch.KERNELS, ids=lambda kernel: kernel.name)


@dataclass(frozen=True)
class Case:
    """A weight, what it is as float64 `[out, in]` without its residual, the inputs and how they enter."""

    weight: Weight | PrunedWeight
    dense: Tensor
    x: Tensor
    activations: Activations
    steps: float

    @property
    def need(self) -> KernelSpec:
        return KernelSpec.of(self.weight, self.activations, self.x.dtype, self.steps)

    def expected(self) -> tuple[Tensor, Tensor]:
        """The product in float64, and the sum of the magnitudes of its terms, which bounds what rounding may do."""
        inputs, x = rounded(self), self.x.double()
        y, size = inputs @ self.dense.T, inputs.abs() @ self.dense.abs().T
        if isinstance(self.weight, Weight) and self.weight.residual is not None:
            residual = torch.zeros_like(self.dense)
            residual[self.weight.residual.rows, self.weight.residual.columns.long()] = (
                self.weight.residual.values.double()
            )
            y, size = y + x @ residual.T, size + x.abs() @ residual.abs().T
        return y, size


def rounded(case: Case) -> Tensor:
    """The inputs in float64 as they enter the product: int8 codes times their scales, but for 16-bit columns."""
    x, width = case.x.float(), case.x.shape[1]
    if case.activations == "float":
        return case.x.double()
    assert isinstance(case.weight, Weight)
    out, kept = x.double(), case.weight.columns
    quiet = x if kept is None else x.index_fill(1, kept, 0)
    for start in range(0, width, width if case.activations == "token" else case.weight.group):
        part = quiet[:, start : start + (width if case.activations == "token" else case.weight.group)]
        scale = part.abs().amax(1, keepdim=True) / case.steps
        scale[scale == 0] = 1
        out[:, start : start + part.shape[1]] = (part / scale).round().clamp(-128, 127).double() * scale.double()
    if kept is not None:
        out[:, kept] = x[:, kept].double()
    return out


def coded(draw: random.Random, generator: torch.Generator) -> tuple[Weight, Tensor]:
    """Any weight of codes, perhaps in memory that is not contiguous."""
    rows, width, group, bits = draw.randint(1, 70), draw.choice(COLUMNS), draw.choice(GROUPS), draw.randint(2, 8)
    zeros = draw.choice(["none", "integer", "real", "levels", "table" if bits <= 4 else "none"])
    groups = -(-width // group)
    codes = torch.randint(0, 2**bits, (width, rows), generator=generator, dtype=torch.uint8).T
    scale = (torch.rand(rows, 1, generator=generator) + 0.1).expand(rows, groups) * (torch.rand(groups) + 0.5)
    scale, zero, levels, table = scale.to(draw.choice([torch.float32, torch.float16])) / 2**bits, None, None, None
    if zeros == "integer":
        zero = torch.randint(0, 2**bits, (groups, rows), generator=generator, dtype=torch.uint8).T
    elif zeros in ("real", "levels"):
        zero = torch.rand(rows, groups, generator=generator) * 2**bits
    elif zeros == "table":
        table = torch.randn(2**bits, generator=generator)
    if zeros == "levels":
        two = Bilevel.fit(scale.float()), Bilevel.fit(zero)
        scale, zero, levels = two[0].values(torch.float32), two[1].values(torch.float32), Levels.of(*two)
    column_group = torch.arange(width) // group
    center = 2 ** (bits - 1) if zero is None else zero.double()[:, column_group]
    dense = (codes.double() - center if table is None else table.double()[codes.long()]) * scale.double()[
        :, column_group
    ]
    kept = residual = outliers = None
    if draw.random() < 0.3:
        kept = torch.randperm(width, generator=generator)[: draw.randint(1, 3)].sort().values
        outliers = torch.randn(rows, len(kept), generator=generator).half()
        dense[:, kept] = outliers.double()
    if draw.random() < 0.3:
        there = torch.rand(rows, width, generator=generator) < draw.choice([0.0, 0.02, 0.5])
        residual = SparseRows.of(there * torch.randn(rows, width, generator=generator).half().float())
    return Weight(codes, scale, zero, bits, group, table, kept, outliers, 0.0, residual, levels), dense


def pruned(draw: random.Random, generator: torch.Generator) -> tuple[PrunedWeight, Tensor]:
    values = torch.randn(draw.randint(1, 70), draw.choice(COLUMNS), generator=generator)
    gone = torch.rand(values.shape, generator=generator) < draw.choice([0.0, 0.5, 0.99, 1.0])
    dtype = draw.choice(["float32", "float16", "bfloat16"])
    tensor = PrunedTensor.of(values, gone, PruneArgs(storage="bitmask", dtype=dtype))
    return PrunedWeight.of(tensor), tensor.values.double()


def inputs(draw: random.Random, generator: torch.Generator, width: int) -> Tensor:
    """Rows of any dtype, strides and size, some of them zero."""
    dtype, batch = draw.choice(DTYPES), draw.choice(BATCHES)
    wide = dtype != torch.float16
    x = torch.randn(batch, width, generator=generator) * draw.choice(
        [1, 1, 1e30 if wide else 1e2, 1e-30 if wide else 1e-3]
    )
    x = x * torch.rand(batch, 1, generator=generator).sub(0.2).clamp(0)
    if batch and draw.random() < 0.3:
        x[-1, draw.randrange(width)] *= 1000 if wide else 10
    x = x.to(dtype)
    layout = draw.choice(["contiguous", "transposed", "columns", "rows", "expanded", "offset"])
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "columns":
        return x.repeat_interleave(3, 1)[:, ::3]
    if layout == "rows":
        return x.repeat_interleave(2, 0)[::2]
    if layout == "expanded":
        return x[:1].expand(batch, width)
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(batch, width) if layout == "offset" else x


def case(seed: int) -> Case:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    weight, dense = (pruned if draw.random() < 0.2 else coded)(draw, generator)
    floats = isinstance(weight, PrunedWeight) or weight.codebook is not None
    activations: Activations = "float" if floats else draw.choice(["float", "group", "token"])
    return Case(weight, dense, inputs(draw, generator, weight.shape[1]), activations, draw.choice([127.0, 127.5]))


def check(kernel: Kernel, it: Case) -> None:
    product = prepare(kernel, it.weight, it.need)
    expected, size = it.expected()
    y = product(it.x)
    assert y.dtype == it.x.dtype and y.shape == expected.shape and y.isfinite().all()
    exact = max(kernel.tolerance, 4 * torch.finfo(it.x.dtype).eps)
    assert ((y.double() - expected).norm(dim=1) <= exact * size.norm(dim=1) + torch.finfo(it.x.dtype).tiny).all()


def served(kernel: Kernel, it: Case) -> bool:
    """Whether `kernel` is for this case and this machine; a failed self-test is an error."""
    refused = dispatch.refusal(kernel, it.need)
    assert refused is None or "self-test" not in refused.reason, it.need
    return refused is None


@each_kernel
@pytest.mark.parametrize("block", range(10))
def test_random_layers_and_inputs(kernel: Kernel, block: int) -> None:
    for seed in range(60 * block, 60 * block + 60):
        it = case(seed)
        if served(kernel, it):
            check(kernel, it)


@each_kernel
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row_and_fills_it(kernel: Kernel, bad: float) -> None:
    for it in (it for it in map(case, range(100)) if len(it.x) >= 3 and served(kernel, it)):
        product, clean = prepare(kernel, it.weight, it.need), it.x.clone()
        spoiled = clean.clone()
        spoiled[1, -1] = bad
        y, others = product(spoiled), [row for row in range(len(clean)) if row != 1]
        assert torch.equal(y[others], product(clean)[others])
        assert isinstance(it.weight, PrunedWeight) or not y[1].isfinite().any()


def large(kernel: Kernel) -> tuple[CodedProduct, list[Tensor], list[Tensor]]:
    """A product that is worth several threads, inputs, and what comes of them."""
    if dispatch.refusal(kernel, KernelSpec(4, 128)) is not None:
        pytest.skip(f"{kernel.name} does not serve here")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (400, 1024), generator=generator, dtype=torch.uint8)
    weight = Weight(codes, torch.rand(400, 8, generator=generator), None, 4, 128)
    product = kernel.prepare(weight, KernelSpec.of(weight))
    inputs = [torch.randn(3, 1024, generator=generator) for _ in range(12)]
    return product, inputs, [product(x) for x in inputs]


@each_kernel
def test_threads_that_have_threads_of_their_own_call_one_product_at_once(kernel: Kernel) -> None:
    product, inputs, expected = large(kernel)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(2,)) as pool:
        for y, same in zip(pool.map(product, inputs * 4), expected * 4, strict=True):
            assert torch.equal(y, same)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@each_kernel
def test_a_child_goes_on_with_what_its_parent_used(kernel: Kernel) -> None:
    """The child has the parent's memory, but none of its threads."""
    if not kernel.name.startswith("c-"):
        pytest.skip("torch's own threads do not outlive a fork")
    product, inputs, expected = large(kernel)
    torch.set_num_threads(2)
    product(inputs[0])
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # what Python thinks of this
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if all(map(torch.equal, map(product, inputs), expected)) else 1)
    torch.set_num_threads(1)
    assert os.waitpid(child, 0)[1] == 0

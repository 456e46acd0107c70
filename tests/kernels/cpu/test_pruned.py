"""Products with pruned weights: every instruction set and plain torch, over shapes, densities, dtypes, strides."""

import random

import pytest
import torch
from torch import Tensor, nn

from lmpress.kernels import dispatch, ops
from lmpress.kernels.cpu import library, pruned
from lmpress.kernels.kernel import KernelSpec
from lmpress.kernels.modules.linear import PrunedLinear, Serving
from lmpress.kernels.outliers import prepare
from lmpress.kernels.tensor import PrunedTensor
from lmpress.kernels.weight import PrunedWeight
from lmpress.recipes.scheme.prune_args import PruneArgs

SPEC = KernelSpec.pruned(torch.bfloat16)
HERE = [kernel for kernel in dispatch.KERNELS if dispatch.refusal(kernel, SPEC) is None]
each_kernel = pytest.mark.parametrize("kernel", HERE, ids=lambda kernel: kernel.name)


def random_tensor(
    rows: int, columns: int, density: float, dtype: str, seed: int, storage: str = "bitmask"
) -> PrunedTensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator)
    if storage == "2:4":
        order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
        return PrunedTensor.of(dense, (order < 2).flatten(1), PruneArgs(pattern="2:4", storage="2:4", dtype=dtype))
    gone = torch.rand(rows, columns, generator=generator) >= density
    return PrunedTensor.of(dense, gone, PruneArgs(storage="bitmask", dtype=dtype))


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm().detach() / expected.norm().detach().clamp(min=1e-30))


@each_kernel
@pytest.mark.parametrize("seed", range(40))
def test_random_layers_equal_float64(kernel, seed: int) -> None:
    draw = random.Random(seed)
    rows, columns = draw.randint(1, 70), draw.choice([1, 7, 8, 43, 63, 64, 65, 100, 128, 172, 256, 520, 1000])
    batch = draw.choice([1, 2, 3, 4, 7, 8, 15, 33, 65, 130])
    dtype = draw.choice(["float32", "float16", "bfloat16"])
    tensor = random_tensor(rows, columns, draw.choice([0.01, 0.1, 0.5, 0.9, 1.0]), dtype, seed)
    weight = PrunedWeight.of(tensor)
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed))
    product = prepare(kernel, weight, KernelSpec.of(weight))
    assert error(product(x), x.double() @ tensor.values.double().T) < 2e-6, (rows, columns, batch, dtype)


@each_kernel
@pytest.mark.parametrize("storage", ["bitmask", "2:4"])
@pytest.mark.parametrize("batch", [1, 9, 300])
def test_wide_layers_of_either_storage_equal_float64(kernel, storage: str, batch: int) -> None:
    tensor = random_tensor(300, 1024, 0.5, "bfloat16", 1, storage)
    weight = PrunedWeight.of(tensor)
    x = torch.randn(batch, 1024, generator=torch.Generator().manual_seed(1))
    assert error(prepare(kernel, weight, SPEC)(x), x.double() @ tensor.values.double().T) < 2e-6


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inputs_may_have_any_stride_and_dtype(kernel, dtype: torch.dtype) -> None:
    tensor = random_tensor(20, 96, 0.5, "float16", 2)
    product = prepare(kernel, PrunedWeight.of(tensor), KernelSpec.pruned(torch.float16, dtype=dtype))
    base = torch.randn(96, 22, generator=torch.Generator().manual_seed(2)).to(dtype)
    for x in (base.T, base.T[::2], base.repeat(2, 1).T[:, 96:]):
        y = product(x)
        assert y.dtype == dtype and torch.equal(y, product(x.contiguous()))
        assert error(y, x.double() @ tensor.values.double().T) < (1e-6 if dtype == torch.float32 else 8e-3)


@each_kernel
def test_special_values_of_16_bits_are_converted_exactly(kernel) -> None:
    """Subnormal numbers, the largest ones, infinities: the cases in which conversions go wrong."""
    for dtype in (torch.float16, torch.bfloat16):
        codes = torch.arange(0, 0x8000, 37, dtype=torch.int32).to(torch.int16)
        values = codes.view(dtype)
        values = torch.cat([values[values.isfinite()], torch.tensor([torch.inf], dtype=dtype)])
        tensor = PrunedTensor(
            values[:, None],
            torch.ones(len(values), 1, dtype=torch.bool),
            PruneArgs(storage="bitmask", dtype=str(dtype)[6:]),
        )
        y = prepare(kernel, PrunedWeight.of(tensor), KernelSpec.pruned(dtype))(torch.ones(1, 1))
        assert torch.equal(y[0], values.float())


@each_kernel
def test_empty_weights_and_empty_inputs_are_served(kernel) -> None:
    weight = PrunedWeight.of(random_tensor(10, 40, 0.0, "float32", 3))
    product = prepare(kernel, weight, KernelSpec.of(weight))
    assert torch.equal(product(torch.ones(2, 40)), torch.zeros(2, 10))
    assert product(torch.empty(0, 40)).shape == (0, 10)


@each_kernel
def test_any_number_of_threads_gives_the_same_bits(kernel, with_threads) -> None:
    product = prepare(kernel, PrunedWeight.of(random_tensor(600, 512, 0.5, "bfloat16", 4)), SPEC)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(4))
    first, *others = with_threads(lambda: product(x))
    assert all(torch.equal(first, other) for other in others)


@each_kernel
@pytest.mark.parametrize("storage", ["bitmask", "2:4"])
def test_the_module_is_traced_moved_and_cast_and_returns_its_weight(kernel, storage: str) -> None:
    tensor = random_tensor(40, 96, 0.5, "bfloat16", 5, storage)
    module = PrunedLinear(tensor, nn.Parameter(torch.arange(40.0)), Serving(kernel=kernel.name))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(5), requires_grad=True)
    y = module(x)
    assert error(y, x.double() @ tensor.values.double().T + torch.arange(40.0)) < 2e-6
    y.sum().backward()
    assert error(x.grad, tensor.values.double().sum(0).expand(5, -1)) < 2e-6
    torch.compiler.reset()  # tests that compile the same method share a limit
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    torch.testing.assert_close(exported.module()(x), y, rtol=1e-5, atol=1e-5)
    module.half().float()
    module.to("meta")
    served = PrunedLinear(tensor, None, Serving(kernel=kernel.name)).half().float().compressed
    assert (
        torch.equal(served.values, tensor.values)
        and torch.equal(served.kept, tensor.kept)
        and served.args == tensor.args
    )


def test_weights_take_as_much_memory_as_on_disk() -> None:
    module = PrunedLinear(random_tensor(64, 512, 0.5, "bfloat16", 6, "2:4"), None)
    starts = 8 * 65
    assert sum(b.nbytes for b in module.buffers()) <= 64 * 512 * 9 // 8 + starts


def test_the_operators_keep_the_contracts_of_torch() -> None:
    if not (sets := [name.removeprefix("c-") for name in (k.name for k in HERE) if name.startswith("c-")]):
        pytest.skip("no compiled kernels here")
    weight = PrunedWeight.of(random_tensor(20, 70, 0.5, "float16", 7))
    given = (weight.mask, weight.values, weight.starts())
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(7), requires_grad=True)
    torch.library.opcheck(ops.cpu_pruned_linear, (x, *given, sets[0]))
    torch.library.opcheck(ops.cpu_pruned_linear_transposed, (torch.randn(3, 20), *given, 70, sets[0]))
    assert set(pruned.SLABS_FROM) >= set(library.instruction_sets())

"""Every instruction set of this machine against float64, over shapes, bits, strides, dtypes, int8 activations."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmpress.errors import CompressError
from lmpress.kernels.cpu import library
from lmpress.kernels.cpu.layout import pack
from lmpress.kernels.cpu.product import KERNELS
from lmpress.kernels.kernel import KernelSpec, Unavailable
from lmpress.kernels.outliers import prepare
from lmpress.kernels.weight import SparseRows, Weight

# The 16 values of NF4 as published (QLoRA, appendix E), rounded to 4 digits: any codebook will do here.
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
NF4 += [0.7230, 1.0]


def kernels_here() -> list:
    try:
        return [kernel for kernel in KERNELS if kernel.name.removeprefix("c-") in library.instruction_sets()]
    except Unavailable as error:
        pytest.skip(f"no compiled kernels here: {error}", allow_module_level=True)


HERE = kernels_here()
each_kernel = pytest.mark.parametrize("kernel", HERE, ids=lambda kernel: kernel.name)


def dense(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, table: Tensor | None = None
) -> Tensor:
    """The weight in float64, element by element."""
    weight = torch.zeros(codes.shape, dtype=torch.float64)
    for k in range(codes.shape[1]):
        g = k // group
        code = codes[:, k].double()
        if table is not None:
            value = table.double()[codes[:, k].long()]
        else:
            value = code - (2 ** (bits - 1) if zero is None else zero[:, g].double())
        weight[:, k] = value * scale[:, g].double()
    return weight


def as_int8(x: Tensor, group: int, steps: float) -> Tensor:
    """`x` rounded to int8 codes per row and group, back as float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group]
        scale = part.abs().amax(1, keepdim=True) / steps
        scale[scale == 0] = 1
        out[:, start : start + group] = (part / scale).round().clamp(-128, 127).double() * scale.double()
    return out


def random_weight(rows: int, columns: int, bits: int, group: int, symmetric: bool, seed: int) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return Weight(codes, scale, None if symmetric else zero, bits, group)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.detach().double() - expected).norm() / expected.norm())


@each_kernel
@pytest.mark.parametrize("seed", range(40))
def test_random_layers_equal_float64(kernel, seed: int) -> None:
    draw = random.Random(seed)
    bits, rows, batch = draw.randint(2, 8), draw.randint(1, 70), draw.choice([1, 2, 3, 4, 7, 8, 15, 33, 65, 130])
    columns = draw.choice([8, 32, 43, 64, 100, 172, 256, 300, 520, 1000])
    group = draw.choice([8, 16, 24, 32, 43, 64, 128, 200, columns])
    weight = random_weight(rows, columns, bits, group, draw.random() < 0.5, seed)
    expected = dense(weight.codes, weight.scale, weight.zero, bits, group)
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed))
    steps = draw.choice([127.0, 127.5])
    for activations, inputs in (
        ("float", x.double()),
        ("group", as_int8(x, group, steps)),
        ("token", as_int8(x, columns, steps)),
    ):
        product = kernel.prepare(weight, KernelSpec.of(weight, activations, steps=steps))
        assert error(product(x), inputs @ expected.T) < 2e-6, (bits, rows, columns, group, batch, activations)
        assert torch.equal(product.codes(), weight.codes)
    if group <= 128:
        rounded = kernel.prepare(weight, KernelSpec.of(weight, "group"))(x)
        assert error(rounded, x.double() @ expected.T) < 1e-2


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activations", ["float", "group"])
def test_inputs_may_have_any_stride_and_dtype(kernel, dtype: torch.dtype, activations) -> None:
    weight = random_weight(20, 96, 4, 32, False, 1)
    product = kernel.prepare(weight, KernelSpec.of(weight, activations, dtype))
    base = torch.randn(96, 22, generator=torch.Generator().manual_seed(1)).to(dtype)
    layouts = {
        "transposed": base.T,
        "every other row": base.T[::2],
        "columns of a wider matrix": base.repeat(2, 1).T[:, 96:],
    }
    for name, x in layouts.items():
        y = product(x)
        assert y.dtype == dtype and y.shape == (x.shape[0], 20), name
        assert torch.equal(y, product(x.contiguous())), name
        assert error(y, x.double() @ weight.dequantize(torch.float64).T) < (
            1e-6 if dtype == torch.float32 else 8e-3
        ) + (1e-2 if activations == "group" else 0)


@each_kernel
@pytest.mark.parametrize("batch", [1, 5, 8, 66])
def test_codebooks_equal_float64(kernel, batch: int) -> None:
    table = torch.tensor(NF4)
    weight = random_weight(37, 192, 4, 64, True, 2)
    weight = Weight(weight.codes, weight.scale, None, 4, 64, codebook=table)
    x = torch.randn(batch, 192, generator=torch.Generator().manual_seed(2))
    expected = dense(weight.codes, weight.scale, None, 4, 64, table)
    y = kernel.prepare(weight, KernelSpec.of(weight))(x)
    assert error(y, x.double() @ expected.T) < 2e-6


@each_kernel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("batch", [1, 9])
def test_extreme_codes_never_saturate(kernel, bits: int, batch: int) -> None:
    columns = 4096
    for code in (0, 2**bits - 1):
        codes = torch.full((17, columns), code, dtype=torch.uint8)
        weight = Weight(codes, torch.ones(17, 1), torch.zeros(17, 1, dtype=torch.uint8), bits, columns)
        for value in (1.0, -1.0):
            x = torch.full((batch, columns), value)
            for activations in ("float", "token"):
                y = kernel.prepare(weight, KernelSpec.of(weight, activations))(x)
                assert y.double().allclose(torch.tensor(value * code * columns, dtype=torch.float64), rtol=1e-6)


@each_kernel
def test_int8_sums_are_exact_integers(kernel) -> None:
    """A wide W8A8 layer: sums beyond 2**24, which a float would round, compared with Python's integers."""
    columns = 40_000
    weight = random_weight(3, columns, 8, columns, True, 3)
    weight = Weight(weight.codes, torch.ones(3, 1), None, 8, columns)
    x = torch.randint(-127, 128, (2, columns), generator=torch.Generator().manual_seed(3)).float()
    x[:, 0] = 127  # the scale is one
    y = kernel.prepare(weight, KernelSpec.of(weight, "token"))(x)
    expected = x.long() @ (weight.codes.long() - 128).T
    assert torch.equal(y, expected.float())


@each_kernel
def test_a_large_mean_of_the_inputs_costs_no_accuracy(kernel) -> None:
    for bits, symmetric in ((4, True), (8, True), (8, False)):
        weight = random_weight(16, 4096, bits, 4096, symmetric, 4)
        x = torch.rand(2, 4096, generator=torch.Generator().manual_seed(4)) + 3
        expected = x.double() @ weight.dequantize(torch.float64).T
        assert error(kernel.prepare(weight, KernelSpec.of(weight))(x), expected) < 1e-5


@each_kernel
def test_nan_and_infinity_propagate(kernel) -> None:
    weight = random_weight(20, 64, 4, 32, False, 5)
    for activations in ("float", "group", "token"):
        for bad in (float("nan"), float("inf")):
            x = torch.ones(3, 64)
            x[1, 40] = bad
            y = kernel.prepare(weight, KernelSpec.of(weight, activations))(x)
            assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2].isfinite().all()


@each_kernel
def test_empty_inputs_and_rows_of_zeros_are_served(kernel) -> None:
    weight = random_weight(20, 64, 4, 32, False, 6)
    for activations in ("float", "group"):
        product = kernel.prepare(weight, KernelSpec.of(weight, activations))
        assert product(torch.empty(0, 64)).shape == (0, 20)
        assert torch.equal(product(torch.zeros(2, 64)), torch.zeros(2, 20))


@each_kernel
@pytest.mark.parametrize("activations", ["float", "group"])
def test_any_number_of_threads_gives_the_same_bits(kernel, activations, with_threads) -> None:
    weight = random_weight(400, 1024, 4, 128, False, 7)
    product = kernel.prepare(weight, KernelSpec.of(weight, activations))
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(7))
    first, *others = with_threads(lambda: product(x))
    assert all(torch.equal(first, other) for other in others)


@each_kernel
def test_several_python_threads_may_multiply_at_once(kernel) -> None:
    from concurrent.futures import ThreadPoolExecutor

    weight = random_weight(300, 1024, 4, 128, True, 8)
    product = kernel.prepare(weight, KernelSpec.of(weight))
    inputs = [torch.randn(2, 1024, generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
    expected = [product(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for y, same in zip(pool.map(product, inputs), expected, strict=True):
            assert torch.equal(y, same)


@each_kernel
@pytest.mark.parametrize("batch", [1, 6])
def test_products_with_outlier_columns_equal_float64(kernel, batch: int) -> None:
    """LLM.int8's mixed product: int8 codes for all but a few columns."""
    base = random_weight(50, 256, 8, 256, True, 9)
    generator = torch.Generator().manual_seed(9)
    columns, kept = torch.tensor([3, 77, 255]), torch.randn(50, 3, generator=generator).half()
    weight = Weight(base.codes, base.scale, None, 8, 256, columns=columns, outliers=kept)
    x = torch.randn(batch, 256, generator=generator)
    x[:, columns] *= 60
    rest = x.clone()
    rest[:, columns] = 0
    expected = (
        as_int8(rest, 256, 127.0) @ dense(base.codes, base.scale, None, 8, 256).T
        + x[:, columns].double() @ kept.double().T
    )
    y = prepare(kernel, weight, KernelSpec.of(weight, "token"))(x)
    assert error(y, expected) < 2e-6
    exact = x.double() @ weight.dequantize(torch.float64).T
    assert error(y, exact) < 1e-2
    assert error(prepare(kernel, weight, KernelSpec.of(weight))(x), exact) < 2e-6


@each_kernel
@pytest.mark.parametrize("batch", [1, 6, 9])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_products_with_a_sparse_residual_equal_float64(kernel, batch: int, share: float) -> None:
    """SpQR's sparse outliers, added to 3-bit codes with real-valued zeros."""
    base = random_weight(90, 160, 3, 16, False, 10)
    generator = torch.Generator().manual_seed(10)
    residual = torch.randn(90, 160, generator=generator) * (torch.rand(90, 160, generator=generator) < share)
    residual = residual.half().float()
    zero = torch.rand(90, 10, generator=generator) * 7
    weight = Weight(base.codes, base.scale, zero, 3, 16, residual=SparseRows.of(residual))
    x = torch.randn(batch, 160, generator=generator)
    full = dense(base.codes, base.scale, zero, 3, 16) + residual.double()
    for by in (kernel, replace(kernel, added=SparseRows.added)):  # the second one is for machines without a compiler
        product = prepare(by, weight, KernelSpec.of(weight))
        inputs = x.clone().requires_grad_()
        y = product(inputs)
        y.sum().backward()
        assert error(y, x.double() @ full.T) < 2e-6
        assert error(product(x), x.double() @ full.T) < 2e-6
        assert error(inputs.grad, full.sum(0).expand(batch, -1)) < 2e-6


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16])
@pytest.mark.parametrize("damage", ["column", "last column", "start", "end", "missing"])
def test_a_sparse_matrix_with_bad_indices_is_refused(rows: int, dtype: torch.dtype, damage: str) -> None:
    sparse = SparseRows.of(torch.ones(5, 40))
    starts, columns, values = sparse.starts, sparse.columns.long(), sparse.values
    if damage.endswith("column"):
        columns[-1 if damage == "last column" else 3] = 65535
    elif damage == "missing":
        columns = columns[:-1]
    else:
        starts[2 if damage == "start" else -1] = 2**40
    y, x = torch.zeros(rows, 5), torch.ones(rows, 40)
    with pytest.raises(CompressError, match="a sparse matrix is damaged"):
        library.add_sparse(y, x, starts, columns.to(dtype), values)


@pytest.mark.parametrize("column", [-1, 64])
def test_columns_outside_of_the_weight_are_refused(column: int) -> None:
    chosen = next(iter(library.instruction_sets().values()))
    columns, outliers = torch.tensor([3, column]), torch.ones(8, 2)
    weight = Weight(torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 1), None, 8, 64, None, columns, outliers)
    with pytest.raises(CompressError, match="the columns kept in 16 bits are not all in the 64 columns of the weight"):
        library.Linear(pack(weight, chosen.lanes), chosen.name, "float", 127.0)

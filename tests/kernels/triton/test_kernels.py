"""The Triton kernels against float64: shapes, bits, groups, zeros, codebooks, int8 inputs, regimes."""

import random

import pytest
import torch
from torch import Tensor

from lmpress.kernels import selftest
from lmpress.kernels.kernel import KernelSpec, WrongMachine
from lmpress.kernels.triton import configs
from lmpress.kernels.triton.layout import pack, unpack
from lmpress.kernels.triton.product import TRITON, TritonProduct
from lmpress.kernels.weight import SparseRows, Weight

pytest.importorskip("triton")

from lmpress.kernels.triton import launch

NF4 = torch.linspace(-1, 1, 16) ** 3  # any codebook will do


def dense(weight: Weight) -> Tensor:
    """The weight in float64, column by column."""
    out = torch.zeros(weight.codes.shape, dtype=torch.float64)
    for k in range(weight.codes.shape[1]):
        g, code = k // weight.group, weight.codes[:, k]
        if weight.codebook is not None:
            value = weight.codebook.double()[code.long()]
        else:
            value = code.double() - (2 ** (weight.bits - 1) if weight.zero is None else weight.zero[:, g].double())
        out[:, k] = value * weight.scale[:, g].double()
    return out


def as_int8(x: Tensor, group: int) -> Tensor:
    """`x` rounded to int8 codes per row and group, back as float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group].float()
        scale = part.abs().amax(1, keepdim=True) / 127
        scale[scale == 0] = 1
        out[:, start : start + group] = (part / scale).round().clamp(-128, 127).double() * scale.double()
    return out


def random_weight(rows: int, columns: int, bits: int, group: int, zeros: str = "none", seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    integers = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    zero = {"none": None, "integer": integers, "real": torch.rand(rows, groups, generator=generator) * 2**bits}[zeros]
    return Weight(codes, scale, zero, bits, group)


def random_inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.detach().cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", range(14))
def test_random_layers_equal_float64(seed: int, device: str) -> None:
    draw = random.Random(seed)
    bits, rows, batch = draw.randint(2, 8), draw.choice([1, 37, 64, 70]), draw.choice([1, 1, 2, 3, 17, 33])
    columns = draw.choice([8, 43, 64, 100, 172])
    group = draw.choice([8, 16, 24, 32, 43, 64, columns])
    weight = random_weight(rows, columns, bits, group, draw.choice(["none", "integer", "real"]), seed)
    dtype = draw.choice([torch.float32, torch.float16])
    x = random_inputs(batch, columns, dtype)
    for activations, inputs in (("float", x.double()), ("group", as_int8(x, group)), ("token", as_int8(x, columns))):
        product = TritonProduct(weight.to(device), KernelSpec.of(weight, activations, dtype))
        y = product(x.to(device))
        assert y.dtype == dtype
        assert error(y, inputs @ dense(weight).T) < (2e-6 if dtype == torch.float32 else 2e-3), (
            activations,
            bits,
            group,
        )
        assert torch.equal(product.codes().cpu(), weight.codes)


@pytest.mark.parametrize("spec", [
    KernelSpec(4, 32),
    KernelSpec(4, 64, symmetric=False, dtype=torch.float16),
    KernelSpec(4, 32, symmetric=False, activations="group"),
    KernelSpec(3, 16, symmetric=False),
    KernelSpec(8, 512, activations="token", steps=127.5),
    KernelSpec(4, 64, codebook=True),
    KernelSpec(8, 96, activations="token", parts=("columns",)),
    KernelSpec(3, 16, symmetric=False, dtype=torch.float16, parts=("levels", "residual")),
], ids=str)  # fmt: skip
def test_the_self_test_accepts_them(spec: KernelSpec) -> None:
    assert selftest.failure(TRITON, spec) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_under_every_zero_at_every_place_is_exact(dtype: torch.dtype, bits: int, device: str) -> None:
    """Codes become floats by their bit patterns. Each row of x selects a column, each row of the weight has another zero."""
    values = 2**bits
    zero = torch.arange(0, values, max(1, values // 16), dtype=torch.uint8).view(-1, 1)
    codes = (
        torch.arange(512).remainder(values).to(torch.uint8).expand(len(zero), -1)
    )  # every code in every part of a slab
    product = TritonProduct(
        Weight(codes, torch.ones(len(zero), 1), zero, bits, 512).to(device), KernelSpec(bits, 512, dtype=dtype)
    )
    expected = codes.T.to(dtype) - zero.T.to(dtype)
    one_hot = torch.eye(512, dtype=dtype, device=device)
    for start in range(0, 512, configs.MOST_ROWS):
        several = slice(start, start + configs.MOST_ROWS)
        assert torch.equal(product(one_hot[several]).cpu(), expected[several])
    for column in range(3, 512, 57):  # a single row has another kernel
        assert torch.equal(product(one_hot[column : column + 1]).cpu(), expected[column : column + 1])


@pytest.mark.parametrize("batch", [1, 3])
def test_codebooks_equal_float64(batch: int, device: str) -> None:
    weight = random_weight(20, 192, 4, 64)
    weight = Weight(weight.codes, weight.scale, None, 4, 64, codebook=NF4)
    product = TritonProduct(weight.to(device), KernelSpec.of(weight))
    assert (
        error(product(random_inputs(batch, 192).to(device)), random_inputs(batch, 192).double() @ dense(weight).T)
        < 1e-6
    )


@pytest.mark.parametrize("zeros", ["none", "integer", "real"])
@pytest.mark.parametrize("group", [64, 43, 300])
def test_many_rows_are_dequantized(zeros: str, group: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "MOST_ROWS", 4)
    monkeypatch.setattr(launch, "SLAB", 32)
    weight = random_weight(70, 300, 3, group, zeros)
    x = random_inputs(5, 300)
    assert (
        error(TritonProduct(weight.to(device), KernelSpec.of(weight))(x.to(device)), x.double() @ dense(weight).T)
        < 1e-6
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("activations", ["float", "token"])
def test_split_sums_are_the_same_bits_every_time(batch: int, activations, device: str, monkeypatch) -> None:
    monkeypatch.setattr(launch, "splits", lambda tiles, slabs, programs: 3)
    weight = random_weight(40, 1000, 4, 1000, "integer")
    product = TritonProduct(weight.to(device), KernelSpec.of(weight, activations))
    x = random_inputs(batch, 1000)
    inputs = x.double() if activations == "float" else as_int8(x, 1000)
    first = product(x.to(device))
    assert error(first, inputs @ dense(weight).T) < 1e-6
    assert torch.equal(product(x.to(device)), first)


@pytest.mark.parametrize(("bits", "group", "activations"), [(8, 192, "token"), (4, 64, "group"), (4, 64, "token")])
def test_many_rows_of_int8_inputs(bits: int, group: int, activations, device: str) -> None:
    """More than 64 rows take other tiles."""
    weight = random_weight(140, 192, bits, group, "integer")
    x = random_inputs(70, 192, torch.float16)
    inputs = as_int8(x, group if activations == "group" else 192)
    y = TritonProduct(weight.to(device), KernelSpec.of(weight, activations, torch.float16))(x.to(device))
    assert error(y, inputs @ dense(weight).T) < 1e-3


def test_codebooks_with_int8_activations_are_refused() -> None:
    table = Weight(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1), None, 4, 64, codebook=NF4)
    for activations in ("group", "token"):
        with pytest.raises(WrongMachine, match="codebooks"):
            TritonProduct(table, KernelSpec.of(table, activations))


def test_int8_sums_are_exact_integers(device: str) -> None:
    weight = random_weight(3, 8192, 8, 8192)
    weight = Weight(weight.codes, torch.ones(3, 1), None, 8, 8192)
    x = torch.randint(-127, 128, (2, 8192), generator=torch.Generator().manual_seed(3)).float()
    x[:, 0] = 127  # the scale is one
    x[0, :] = 127
    weight.codes[0] = 255
    y = TritonProduct(weight.to(device), KernelSpec.of(weight, "token"))(x.to(device))
    assert torch.equal(y.cpu(), (x.long() @ (weight.codes.long() - 128).T).float())


def test_strides_empty_inputs_and_gradients_are_supported(device: str) -> None:
    weight = random_weight(20, 96, 4, 32, "integer")
    product = TritonProduct(weight.to(device), KernelSpec.of(weight))
    x = random_inputs(96, 6).to(device)
    assert torch.equal(product(x.T), product(x.T.contiguous()))
    assert torch.equal(product(x.T[::2]), product(x.T)[::2])
    assert product(x.T[:0]).shape == (0, 20)
    leaf = x.T.contiguous().requires_grad_()
    product(leaf).square().sum().backward()
    expected = 2 * (leaf.detach().cpu().double() @ dense(weight).T) @ dense(weight)
    assert leaf.grad is not None and error(leaf.grad, expected) < 1e-5


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_products_with_sparse_rows_equal_float64(batch: int, device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    residual = torch.randn(30, 200, generator=generator) * (torch.rand(30, 200, generator=generator) < 0.3)
    residual[3] = 0
    residual = residual.half().float()
    rows = SparseRows.of(residual)
    x, y = random_inputs(batch, 200), random_inputs(batch, 30, seed=4)
    sparse = (rows.starts.to(device), rows.columns.to(device), rows.values.to(device))
    found = launch.added_sparse(y.to(device), x.to(device), *sparse)
    assert error(found, y.double() + x.double() @ residual.double().T) < 1e-6


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [16, 43, 128, 300])
def test_the_layout_loses_nothing_and_stays_small(bits: int, group: int) -> None:
    weight = random_weight(5, 300, bits, group)
    for int8 in (False, True):
        tiles = pack(weight, int8)
        assert torch.equal(unpack(tiles, bits), weight.codes)
    wide = pack(random_weight(8, 4096, bits, 128))
    held = wide.low.nbytes + (0 if wide.high is None else wide.high.nbytes)
    assert held == 8 * 4096 * (bits if bits < 4 else 4 if bits == 4 else 8) // 8


def test_kernels_start_where_their_tensors_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are several GPUs, the current one may be another."""
    entered, around = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor.device.type) or around(tensor))
    weight = random_weight(20, 96, 4, 32)
    TritonProduct(weight.to(device), KernelSpec.of(weight, "group"))(random_inputs(3, 96).to(device))
    assert entered == [device] * 2  # inputs become codes, and then the product


def test_only_gpus_are_supported() -> None:
    assert TRITON.serves.refusal(KernelSpec(4, 128)) == "device cpu not served"
    assert TRITON.serves.refusal(KernelSpec(4, 128, device="cuda", dtype=torch.bfloat16)) is None

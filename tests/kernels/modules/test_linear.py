"""PackedLinear against float64, and what casts, moves and copies leave alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.kernels.modules.linear import PackedLinear
from lmpress.kernels.modules.replace import replace_linear
from lmpress.kernels.tensor import CompressedTensor
from lmpress.recipes.scheme import QuantArgs

ROWS, COLUMNS = 19, 86


def quantized(bits: int, symmetric: bool = True, group: int | None = 43) -> CompressedTensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(bits)) / COLUMNS**0.5
    return round_to_nearest(weight, QuantArgs(bits, symmetric, "group" if group else "channel", group))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(1))


def bias() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, ROWS), requires_grad=False)


def exact(x: Tensor, tensor: CompressedTensor, added: Tensor | None) -> Tensor:
    """The product in float64, an element of the weight at a time."""
    group = COLUMNS // tensor.scale.shape[1]
    zero = torch.full_like(tensor.scale, 2 ** (tensor.args.bits - 1)) if tensor.zero is None else tensor.zero
    weight = torch.tensor(
        [
            [float(tensor.scale[i, j // group]) * (int(tensor.codes[i, j]) - int(zero[i, j // group])) for j in range(COLUMNS)]
            for i in range(ROWS)
        ],
        dtype=torch.float64,
    )  # fmt: skip
    return x.double() @ weight.T + (0 if added is None else added.double())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [43, 2, None])
def test_equals_float64(bits: int, symmetric: bool, group: int | None) -> None:
    tensor = quantized(bits, symmetric, group)
    for added in (None, bias()):
        found = PackedLinear(tensor, added)(inputs(3))
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), exact(inputs(3), tensor, added), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 0)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    tensor = quantized(4)
    found = PackedLinear(tensor, bias())(inputs(*shape))
    assert found.shape == (*shape, ROWS)
    assert torch.allclose(found.double(), exact(inputs(*shape), tensor, bias()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["to", "half_or_double"])
def test_casts_keep_the_stored_numbers(dtype: torch.dtype, method: str) -> None:
    for scale_dtype in ("float16", "float32"):
        tensor = round_to_nearest(torch.randn(ROWS, COLUMNS), QuantArgs(4, False, "group", 2, scale_dtype=scale_dtype))
        linear = PackedLinear(tensor, bias())
        module = nn.Sequential(linear)
        cast = {torch.float16: module.half, torch.bfloat16: module.bfloat16, torch.float64: module.double}[dtype]
        module.to(dtype) if method == "to" else cast()
        scale = linear.compressed.scale
        assert scale.dtype == tensor.scale.dtype and torch.equal(scale, tensor.scale)
        assert linear.zero is not None and torch.equal(linear.zero, tensor.zero)
        assert linear.bias is not None and linear.bias.dtype == dtype
        assert torch.equal(linear.compressed.dequantize(), tensor.dequantize())
        x = inputs(4).to(dtype)
        found = module(x)
        assert found.dtype == dtype
        tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float64: 1e-5}[dtype]
        assert (found.double() - exact(x, tensor, bias())).abs().max() <= tolerance * COLUMNS**0.5


@pytest.mark.parametrize("to", [("meta",), ("meta", torch.bfloat16)], ids=["device", "device and dtype"])
def test_what_is_held_follows_to_another_device_in_its_dtype(to: tuple[Any, ...]) -> None:
    linear = PackedLinear(quantized(4, symmetric=False), None)
    before = {name: buffer.dtype for name, buffer in linear.named_buffers()}
    after = dict(linear.to(*to).named_buffers())
    assert {buffer.device.type for buffer in after.values()} == {"meta"}
    assert {name: buffer.dtype for name, buffer in after.items() if name in ("zero", "product.packed")} == {
        name: dtype for name, dtype in before.items() if name in ("zero", "product.packed")
    }


def test_three_bits_take_three_bits() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    linear = PackedLinear(round_to_nearest(weight, QuantArgs(3, group_size=64)), None)
    largest = max(buffer.nbytes for buffer in linear.product.buffers())
    assert largest == 32 * 256 * 3 / 8


def test_a_copy_serves_the_same_and_shares_nothing() -> None:
    linear = PackedLinear(quantized(4, symmetric=False), bias())
    twin = copy.deepcopy(linear)
    assert torch.equal(twin(inputs(2)), linear(inputs(2)))
    for buffer in twin.product.buffers():
        buffer.zero_()
    assert not torch.equal(twin(inputs(2)), linear(inputs(2)))


def test_the_module_holds_nothing_dense() -> None:
    linear = PackedLinear(quantized(4), bias())
    before = {name: tensor.clone() for name, tensor in linear.named_buffers()}
    linear(inputs(2))
    assert all(tensor.nbytes < ROWS * COLUMNS for tensor in before.values())  # a byte per weight would be dense
    assert {name for name, _ in linear.named_parameters()} == {"bias"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in linear.named_buffers())
    assert list(linear.state_dict()) == ["bias"]
    assert "86, 19, int4 symmetric, group_size=43" in repr(linear)


def test_gradients_reach_the_input() -> None:
    tensor = quantized(4)
    x = inputs(2).requires_grad_()
    PackedLinear(tensor, None)(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, tensor.dequantize().sum(0).expand(2, -1), atol=1e-5)


def test_replacing_keeps_the_bias_and_the_neighbours() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(COLUMNS, ROWS), "c": nn.Linear(2, 2)})})
    added, neighbour = model.get_parameter("a.b.bias"), model.get_submodule("a.c")
    replace_linear(model, "a.b", quantized(4))
    new = model.get_submodule("a.b")
    assert isinstance(new, PackedLinear) and new.bias is added
    assert model.get_submodule("a.c") is neighbour

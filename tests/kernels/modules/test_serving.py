"""Packed layers choose a kernel, are traced through it, move and are cast, and give back what they serve."""

import pytest
import torch
from torch import nn

from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.errors import UsageError
from lmpress.kernels import dispatch
from lmpress.kernels.kernel import KernelSpec
from lmpress.kernels.modules.linear import PackedLinear, Serving, kernels_of, serve
from lmpress.recipes.scheme import QuantArgs

INT4 = QuantArgs(group_size=32)


def layer(args: QuantArgs = INT4, bias: bool = True) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 96, generator=generator)
    return PackedLinear(
        round_to_nearest(weight, args), nn.Parameter(torch.randn(40, generator=generator)) if bias else None
    )


def expected(module: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    y = x.double() @ module.compressed.dequantize(torch.float64).T
    return y if module.bias is None else y + module.bias.double()


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_every_grid_is_served_exactly_by_default(bits: int, symmetric: bool, strategy) -> None:
    module = layer(QuantArgs(bits, symmetric, strategy, 32 if strategy == "group" else None))
    before = module.compressed
    module.serve(Serving())
    x = inputs(2, 3)
    torch.testing.assert_close(module(x).double(), expected(module, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(module.compressed.codes, before.codes)
    assert module.serving.activations == "float"


def test_int8_activations_only_when_asked() -> None:
    module, x = layer(bias=False), inputs(4)
    module.serve(Serving(exact=False))
    error = (module(x) - expected(module, x)).norm() / expected(module, x).norm()
    assert 1e-4 < error < 1e-2
    assert module.serving.activations == "group"


def test_the_choice_is_visible_and_can_be_forced() -> None:
    model = nn.Sequential(layer(), nn.ReLU())
    serve(model, Serving(kernel="torch-dequantize"))
    assert kernels_of(model) == {"torch-dequantize float": 1}
    assert "kernel=torch-dequantize" in repr(model)
    serve(model, Serving())
    chosen = dispatch.choose(KernelSpec(4, 32)).kernel.name
    assert kernels_of(model) == {f"{chosen} float": 1}
    with pytest.raises(UsageError, match="bits 8 not served"):
        layer(QuantArgs(8, group_size=32)).serve(Serving(False, "torch-int4-bf16"))


def test_compile_and_export() -> None:
    module, x = layer(), inputs(5)
    module.serve(Serving())
    y = module(x)
    torch.compiler.reset()  # tests that compile the same method share a limit
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y, rtol=0, atol=0)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    torch.testing.assert_close(exported.module()(x), y, rtol=0, atol=0)
    torch.testing.assert_close(exported.module()(inputs(9)), module(inputs(9)), rtol=0, atol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_reach_the_inputs(exact: bool) -> None:
    module = layer()
    module.serve(Serving(exact))
    x = inputs(3, 2).requires_grad_()
    module(x).square().sum().backward()
    weight = module.compressed.dequantize(torch.float64)
    gradient = 2 * module(x).detach().double() @ weight  # int8 codes are passed straight through
    torch.testing.assert_close(x.grad.double(), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_change_the_arithmetic_and_not_what_is_stored(dtype: torch.dtype) -> None:
    module = layer()
    module.serve(Serving())
    before = module.compressed
    module.to(dtype)
    module.to(dtype)  # again: nothing that is stored may be cast on the way
    assert module.bias.dtype == dtype and module.compressed.scale.dtype == before.scale.dtype
    x = inputs(3).to(dtype)
    assert module(x).dtype == dtype
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(module(x).double(), expected(module, x), rtol=tolerance, atol=10 * tolerance)
    assert torch.equal(module.compressed.codes, before.codes)


def test_memory_holds_the_weight_once() -> None:
    module = layer(bias=False)
    module.serve(Serving())
    codes = 40 * 96 // 2
    sizes = {name: buffer.nbytes for name, buffer in module.named_buffers()}
    assert sum(sizes.values()) < 2 * codes  # codes, and scales in two dtypes
    assert not [name for name in module.state_dict() if "product" in name]

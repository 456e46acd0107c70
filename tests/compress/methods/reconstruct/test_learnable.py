"""The learnable form of a quantized matrix: its start, its range and its gradients."""

import pytest
import torch
from torch import Tensor

from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.methods.reconstruct.learnable import LearnableQuantizer
from lmpress.kernels.tensor import CompressedTensor
from lmpress.recipes.scheme import QuantArgs

ARGS = [
    QuantArgs(bits=4, group_size=8),
    QuantArgs(bits=2, symmetric=False, group_size=8),
    QuantArgs(bits=3, symmetric=False, strategy="channel", group_size=None),
    QuantArgs(bits=8, strategy="tensor", group_size=None, formula="signed", scale_dtype="float32"),
]


def weight(seed: int = 0) -> Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(seed))


def equal(one: CompressedTensor, other: CompressedTensor) -> bool:
    zeros = one.zero is None if other.zero is None else one.zero is not None and torch.equal(one.zero, other.zero)
    return zeros and torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("args", ARGS, ids=lambda a: f"{a.bits}-{a.strategy}")
@pytest.mark.parametrize("in_weights", [False, True])
def test_starts_with_the_codes_of_the_quantizer(args: QuantArgs, in_weights: bool) -> None:
    tensor = round_to_nearest(weight(seed=1), args)  # codes of quite another weight
    assert equal(LearnableQuantizer(weight(), tensor, in_weights=in_weights).tensor(), tensor)


@pytest.mark.parametrize("args", ARGS, ids=lambda a: f"{a.bits}-{a.strategy}")
def test_the_trained_weight_is_the_stored_weight(args: QuantArgs) -> None:
    quantizer = LearnableQuantizer(weight(), round_to_nearest(weight(), args))
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        if args.symmetric:
            quantizer.zero.copy_(torch.full_like(quantizer.zero, 2 ** (args.bits - 1)))
    stored = quantizer.tensor()
    assert stored.codes.max() <= args.maxq and stored.scale.dtype == args.torch_scale_dtype
    assert torch.equal(stored.dequantize(), quantizer().detach())


def test_soft_rounding_hardens_to_the_stored_values() -> None:
    args = QuantArgs(bits=3, group_size=8)
    quantizer = LearnableQuantizer(weight(), round_to_nearest(weight(), args))
    hard, step = quantizer().detach(), quantizer.tensor().scale.float().max()
    away = [float((quantizer(softness).detach() - hard).abs().max() / step) for softness in (0.5, 0.1, 0.002)]
    assert 0.5 >= away[0] > away[1] > away[2] and away[2] < 0.01


def test_soft_rounding_has_the_gradient_of_its_own_value() -> None:
    quantizer = LearnableQuantizer(
        weight(), round_to_nearest(weight(), QuantArgs(bits=8, group_size=8, scale_dtype="float32"))
    )
    slope = torch.randn(6, 24, generator=torch.Generator().manual_seed(4))
    (gradient,) = torch.autograd.grad((quantizer(0.3) * slope).sum(), [quantizer.offset])
    with torch.no_grad():
        before, moved = quantizer(0.3), 1e-3
        quantizer.offset += moved
        measured = (quantizer(0.3) - before) * slope / moved
    agrees = (gradient.flatten(1) - measured).abs() < 0.02 * measured.abs().max()
    assert agrees.float().mean() > 0.97  # except if a weight just crossed the middle of its cell


def test_gradients_are_those_without_rounding_and_none_beyond_the_ends() -> None:
    args = QuantArgs(bits=2, symmetric=False, group_size=8, scale_dtype="float32")
    tensor = round_to_nearest(weight(), args)
    quantizer = LearnableQuantizer(weight(), tensor)
    slope = torch.randn(6, 24, generator=torch.Generator().manual_seed(4))
    (quantizer() * slope).sum().backward()
    scale, zero = tensor.scale, tensor.zero
    assert zero is not None and quantizer.offset.grad is not None and quantizer.stretch.grad is not None
    grouped = slope.unflatten(1, (3, 8))
    torch.testing.assert_close(quantizer.offset.grad, grouped * scale.unsqueeze(-1))
    steps = tensor.codes.float().unflatten(1, (3, 8)) - zero.unsqueeze(-1)
    torch.testing.assert_close(quantizer.stretch.grad, (grouped * steps).sum(-1) * scale)


def test_a_zero_moves_the_ends_of_the_range_not_the_values_inside() -> None:
    args = QuantArgs(bits=4, symmetric=False, group_size=8)
    tensor = round_to_nearest(weight(), args)
    quantizer = LearnableQuantizer(weight(), tensor)
    with torch.no_grad():
        quantizer.zero += torch.where(quantizer.zero < 8, 1.0, -1.0)
    before, after = tensor.dequantize(), quantizer().detach()
    inside = (quantizer.tensor().codes > 0) & (quantizer.tensor().codes < args.maxq)
    assert inside.float().mean() > 0.5 and torch.equal(before[inside], after[inside])

"""Integer grids of activations: found anew at every call (dynamic) or calibrated once (static).

Symmetric, `scale = absmax / (2**(bits-1) - 1)`, codes `-2**(bits-1) .. 2**(bits-1) - 1` (the grid of SmoothQuant and of
compressed-tensors' int8 activations).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .scheme import QuantArgs
from .tensor import Compressed, CompressedTensor, LowRankTensor, MixedTensor

SMALLEST = 1e-5  # SmoothQuant's floor of an activation range


def scale_of(absmax: Tensor, args: QuantArgs) -> Tensor:
    """The scale of values up to `absmax` in magnitude, in the dtype of `absmax`."""
    return absmax.clamp(min=SMALLEST) / (2 ** (args.bits - 1) - 1)


def ranges(x: Tensor, args: QuantArgs) -> Tensor:
    """The largest magnitudes of `x` `[..., width]` that share a scale: `[..., 1]` per token, a single one per tensor."""
    return x.abs().amax(-1, keepdim=True) if args.strategy == "token" else x.abs().amax()


def encode(x: Tensor, scale: Tensor, args: QuantArgs) -> Tensor:
    """The nearest signed codes of `x`, in its own dtype; `scale` broadcasts."""
    largest = 2 ** (args.bits - 1) - 1
    return (x / scale).round_().clamp_(-largest - 1, largest)


def fake_quantize(x: Tensor, args: QuantArgs, scale: Tensor | None = None) -> Tensor:
    """`x` rounded to the grid: the calibrated `scale`, or without one the scales of its own ranges. Computed in float32."""
    values = x.float()
    scale = scale_of(ranges(values, args), args) if scale is None else scale.to(torch.float32)
    return (encode(values, scale, args) * scale).to(x.dtype)


@contextmanager
def quantized_inputs(block: nn.Module, compressed: Mapping[str, Compressed]) -> Iterator[None]:
    """Inside the `with`, the linears of `block` (names inside it) round their inputs as they will when served."""
    with ExitStack() as hooks:
        for name, whole in compressed.items():
            tensor = whole.base if isinstance(whole, LowRankTensor) else whole
            if isinstance(tensor, CompressedTensor | MixedTensor) and tensor.inputs is not None:
                hooks.callback(block.get_submodule(name).register_forward_pre_hook(_rounding(tensor)).remove)
        yield


def decompose(x: Tensor, args: QuantArgs, columns: Tensor) -> Tensor:
    """`x` `[..., width]` rounded but for `columns` and those that reach the threshold, which widen no scale (LLM.int8)."""
    apart = (x.abs() >= args.threshold).flatten(0, -2).any(0) if args.threshold else x.new_zeros(x.shape[-1]).bool()
    apart[columns] = True
    return torch.where(apart, x, fake_quantize(x.masked_fill(apart, 0), args))


def _rounding(tensor: CompressedTensor | MixedTensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert tensor.inputs is not None
        if isinstance(tensor, MixedTensor):
            return (decompose(inputs[0], tensor.inputs, tensor.columns), *inputs[1:])
        return (fake_quantize(inputs[0], tensor.inputs, tensor.input_scale), *inputs[1:])

    return hook

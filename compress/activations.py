"""Integer grids of activations: found anew at every call (dynamic) or calibrated once (static).

Symmetric, `scale = absmax / (2**(bits-1) - 1)`, codes `-2**(bits-1) .. 2**(bits-1) - 1` (the grid of SmoothQuant and of
compressed-tensors' int8 activations).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .scheme import QuantArgs
from .tensor import Compressed, CompressedTensor

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
        for name, tensor in compressed.items():
            if isinstance(tensor, CompressedTensor) and tensor.inputs is not None:
                rounding = _rounding(tensor.inputs, tensor.input_scale)
                hooks.callback(block.get_submodule(name).register_forward_pre_hook(rounding).remove)
        yield


def _rounding(args: QuantArgs, scale: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize(inputs[0], args, scale), *inputs[1:])

    return hook

"""Integer grids of activations: computed at every call (dynamic) or calibrated once (static).

    symmetric   scale = absmax / (2**(bits-1) - 1), zero = 2**(bits-1)        SmoothQuant, compressed-tensors
    asymmetric  scale = (max(high, 0) - min(low, 0)) / (2**bits - 1), zero = round(-low / scale)

Codes `0 .. 2**bits - 1` are handled less their zero, as signed numbers: `rounded = scale * (code - zero)`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..recipes.scheme import QuantArgs, kinds
from .tensor import Compressed, InputGrid

SMALLEST = 1e-5  # SmoothQuant's floor of an activation range


def grid_of(
    low: Tensor, high: Tensor, args: QuantArgs, stored: torch.dtype | None = None, reach: float = 0.0
) -> InputGrid:
    """Scale and zero of values between `low` and `high`, in their dtype; the scale rounded to `stored` if that is given.

    Symmetric ranges end `reach` steps beyond the largest code.
    """
    if args.symmetric:
        scale = torch.maximum(-low, high).clamp(min=SMALLEST) / (2 ** (args.bits - 1) - 1 + reach)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low).clamp(min=SMALLEST) / args.maxq
    if stored is not None:
        scale = scale.to(stored).to(low.dtype)
    zero = (
        torch.full_like(scale, 2 ** (args.bits - 1)) if args.symmetric else (-low / scale).round().clamp(0, args.maxq)
    )
    return scale, zero


def extremes(x: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor]:
    """The ends of the range of values of `x` `[..., width]` that share a scale: `[..., 1]` per token, one number per tensor."""
    return (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if args.strategy == "token" else (x.amin(), x.amax())


def encode(x: Tensor, grid: InputGrid, args: QuantArgs) -> Tensor:
    """The nearest codes of `x` less their zero, in its own dtype; the grid broadcasts."""
    scale, zero = grid
    return (x / scale).round_().clamp_(-zero, args.maxq - zero)


def fake_quantize(x: Tensor, args: QuantArgs, grid: InputGrid | None = None, reach: float = 0.0) -> Tensor:
    """`x` rounded to the calibrated `grid`, or if there is none to that of its ranges (see `grid_of`). In float32."""
    values = x.float()
    if grid is None:
        grid = grid_of(*extremes(values, args), args, reach=reach)
    grid = grid[0].float(), grid[1].float()
    return (encode(values, grid, args) * grid[0]).to(x.dtype)


@contextmanager
def quantized_inputs(block: nn.Module, compressed: Mapping[str, Compressed], reach: float = 0.0) -> Iterator[None]:
    """Inside the `with`, the linears of `block` (names inside it) round their inputs as they will when served; gradients pass
    straight through the rounding. `reach` is that of dynamic scales where they are served (see `grid_of`)."""
    with ExitStack() as hooks:
        for name, tensor in compressed.items():
            rounding = kinds.kind_of_tensor(tensor).rounding(tensor, reach)
            if rounding is not None:
                hooks.callback(block.get_submodule(name).register_forward_pre_hook(_straight_through(rounding)).remove)
        yield


def decompose(x: Tensor, args: QuantArgs, columns: Tensor) -> Tensor:
    """`x` `[..., width]` rounded but for `columns` and those that reach the threshold, which widen no scale (LLM.int8)."""
    outlying = (x.abs() >= args.threshold).flatten(0, -2).any(0) if args.threshold else x.new_zeros(x.shape[-1]).bool()
    outlying[columns] = True
    return torch.where(outlying, x, fake_quantize(x.masked_fill(outlying, 0), args))


def _straight_through(
    rounding: Callable[[Tensor], Tensor],
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        rounded = rounding(x.detach())
        return (x + (rounded - x).detach() if x.requires_grad else rounded, *inputs[1:])

    return hook

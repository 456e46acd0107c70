"""Block reconstruction: the training loop of all methods that train a block towards a target, judged on held-out batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

from ....calibrate.activation_store import ActivationStore
from ....calibrate.runner import BlockIO, Call
from ....errors import UsageError
from ....kernels.activations import quantized_inputs
from ....kernels.tensor import CompressedTensor
from ...block import Block
from ...input_grids import with_input_grids
from ...report.verdict import BEFORE_TRAINING
from .learnable import LearnableQuantizer

HELD_OUT = 8  # one batch in 8 is held out
LAYER_FIGURES = ("loss", "damped_loss", "relative_error")  # figures of a quantizer that training makes obsolete
CHECKS = 8  # number of evaluations on the held-out batches, evenly spaced over the steps


@dataclass(frozen=True)
class Target:
    """The training target of a block: its output for the hidden states `inputs[i]` should be `targets[i]`.

    `softness` is that of the rounding at the start and at the end; it decreases geometrically. 0 means straight-through
    gradients.
    """

    inputs: ActivationStore
    targets: ActivationStore
    softness: tuple[float, float] = (0.0, 0.0)

    def softness_at(self, share: float) -> float:
        """The softness after a `share` (0 to 1) of the steps."""
        first, last = self.softness
        return first * (last / first) ** share if first else 0.0


@dataclass(frozen=True)
class Result:
    """The error on held-out batches before and after training, and the step with the least error (0: the start).

    The error of a token is its squared distance from the target divided by the target's squared norm. The next norm divides
    by that norm too, and otherwise a few tokens with a very large norm would dominate.
    """

    before: float
    after: float
    step: int


def learnable_quantizers(block: Block, in_weights: bool = False) -> dict[str, LearnableQuantizer]:
    """The learnable form of the block's linears by their names inside it.

    Raises `UsageError` if a linear's result is not a plain grid. `in_weights`: see `LearnableQuantizer`.
    """
    quantizers = {}
    for name, linear in block.local().items():
        if not isinstance(linear.result, CompressedTensor):
            raise UsageError(
                f"{linear.name} is not quantized to a plain grid, and only plain grids can be trained",
                "use gptq, rtn or zeroquant before this pass",
            )
        quantizers[name] = LearnableQuantizer(linear.weight, linear.result, in_weights)
    return quantizers


def check_softness(soft: float, hard: float) -> None:
    """Raise `UsageError` unless `soft` is 0 or `hard` is above 0 and at most `soft`."""
    if soft and not 0 < hard <= soft:
        raise UsageError(
            f"hard must be above 0 and at most soft, got soft={soft} and hard={hard}",
            "use soft=0.2 and hard=0.005, or soft=0",
        )


@torch.no_grad()
def original_outputs(io: BlockIO, inputs: ActivationStore) -> ActivationStore:
    """The original block's outputs for `inputs`, by batch."""
    store = ActivationStore(io.scratch)
    for i, call in enumerate(io.calls):
        store[i] = call.replay(io.original, inputs[i].to(io.device))
    return store


def reconstruct(
    block: Block, quantizers: Mapping[str, LearnableQuantizer], target: Target, optimiser: Optimizer, steps: int
) -> Result:
    """Train `quantizers` (by the linears' names inside the block) for `steps` batches, and set each linear's best result.

    If the scheme quantizes inputs, they are rounded as at run time; static grids are those before the training. The learning
    rates of `optimiser` decrease to zero along a half cosine; `block.seed` seeds the order of the batches. The block's module
    is not modified.
    """
    io = block.io
    assert io is not None
    batches = ((call, target.inputs[i].to(io.device), _mask(io, i)) for i, call in enumerate(io.calls))
    results_with_inputs = with_input_grids(block, batches)
    generator = torch.Generator().manual_seed(block.seed)
    shuffled = torch.randperm(len(io), generator=generator).tolist()
    count = max(1, len(io) // HELD_OUT)
    held_out, training = shuffled[:count], shuffled[count:] or shuffled
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    schedule = LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)

    def loss(i: int, softness: float = 0.0) -> Tensor:
        weights = {name: quantizer(softness) for name, quantizer in quantizers.items()}
        with quantized_inputs(block.module, results_with_inputs):
            output = _replay(io.calls[i], block.module, weights, target.inputs[i].to(io.device))
        wanted = io.tokens(i, target.targets[i].to(io.device))
        norms = wanted.square().mean(1).clamp(min=torch.finfo(wanted.dtype).eps)
        return ((io.tokens(i, output) - wanted).square().mean(1) / norms).mean()

    before = best = _mean(loss, held_out)
    best_step, results = 0, {name: quantizer.tensor() for name, quantizer in quantizers.items()}
    order: list[int] = []
    for step in range(1, steps + 1):
        order = order or [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
        softness = target.softness_at((step - 1) / steps)
        gradients = torch.autograd.grad(loss(order.pop(), softness), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        schedule.step()
        if step % math.ceil(steps / CHECKS) == 0 or step == steps:
            now = _mean(loss, held_out)
            if now < best:
                best, best_step = now, step
                results = {name: quantizer.tensor() for name, quantizer in quantizers.items()}
    for name, linear in block.local().items():
        linear.result = results.get(name, linear.result)
    return Result(before, best, best_step)


def record_figures(block: Block, result: Result) -> None:
    """Add the result to the figures of the block's linears; those of the quantizer are renamed to `..._before_training`."""
    for linear in block.linears:
        figures = {f"{k}{BEFORE_TRAINING}" if k in LAYER_FIGURES else k: v for k, v in linear.figures.items()}
        linear.figures = figures | {
            "block_loss_before": result.before,
            "block_loss": result.after,
            "best_step": result.step,
        }


def _mask(io: BlockIO, i: int) -> Tensor | None:
    return None if io.masks is None else io.masks[i].to(io.device)


@torch.no_grad()
def _mean(loss: Callable[[int], Tensor], batches: Sequence[int]) -> float:
    return sum(float(loss(i)) for i in batches) / len(batches)


def _replay(call: Call, module: nn.Module, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """The block's output with `weights` `[out, in]` in place of those of its linears."""
    parameters = {
        f"{name}.weight": weight.T if isinstance(module.get_submodule(name), Conv1D) else weight
        for name, weight in weights.items()
    }
    return call.replay(lambda *args, **kwargs: functional_call(module, parameters, args, kwargs), hidden)

"""The training loop of every pass that learns: one block, made to give what it should give, judged on rows it never saw."""

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

HELD_OUT = 8  # one batch in so many is not trained on
OF_A_LAYER = ("loss", "damped_loss", "relative_error")  # figures that training a layer outdates
CHECKS = 8  # how often the held-out rows are looked at, evenly over the steps


@dataclass(frozen=True)
class Target:
    """What a block is to learn: for the hidden states `inputs[i]`, to give `targets[i]`.

    `softness` of the rounding sinks geometrically from the first number to the second; zeros round straight through.
    """

    inputs: ActivationStore
    targets: ActivationStore
    softness: tuple[float, float] = (0.0, 0.0)

    def softness_at(self, share: float) -> float:
        """The softness when that `share` of the steps is done."""
        first, last = self.softness
        return first * (last / first) ** share if first else 0.0


@dataclass(frozen=True)
class Result:
    """The error on held-out rows before and after, and the step that was best (0: the start).

    The error of a token is its squared distance from the target, relative to the target's square: the norm that reads the
    stream next divides by its length, and so a few tokens of enormous length decide nothing.
    """

    before: float
    after: float
    step: int


def learnable_quantizers(block: Block, in_weights: bool = False) -> dict[str, LearnableQuantizer]:
    """The learnable form of the block's linears by their names inside it. Raises `UsageError` for what has none."""
    quantizers = {}
    for name, linear in block.local().items():
        if not isinstance(linear.result, CompressedTensor):
            raise UsageError(
                f"{linear.name} is no plain grid of codes, which is all that can be trained",
                "put gptq, rtn or zeroquant first",
            )
        quantizers[name] = LearnableQuantizer(linear.weight, linear.result, in_weights)
    return quantizers


def check_softness(soft: float, hard: float) -> None:
    """Raise `UsageError` where rounding cannot sink from `soft` to `hard`."""
    if soft and not 0 < hard <= soft:
        raise UsageError(f"rounding cannot sink from {soft} to {hard}", "use soft=0.2 and hard=0.005, or soft=0")


@torch.no_grad()
def targets(io: BlockIO, inputs: ActivationStore) -> ActivationStore:
    """What the original block gives for `inputs`."""
    store = ActivationStore(io.scratch)
    for i, call in enumerate(io.calls):
        store[i] = call.replay(io.original, inputs[i].to(io.device))
    return store


def reconstruct(
    block: Block, quantizers: Mapping[str, LearnableQuantizer], target: Target, optimiser: Optimizer, steps: int
) -> Result:
    """Train `quantizers` (by the linears' names inside the block) for `steps` batches, and give each linear its best result.

    Inputs of linears that are quantized when served are rounded as they will be, static grids as they are before the
    training. The rates of `optimiser` fall to zero along a half cosine; `block.seed` shuffles the batches. The block's module
    is not touched.
    """
    io = block.io
    assert io is not None
    batches = ((call, target.inputs[i].to(io.device), _mask(io, i)) for i, call in enumerate(io.calls))
    served = with_input_grids(block, batches)
    generator = torch.Generator().manual_seed(block.seed)
    shuffled = torch.randperm(len(io), generator=generator).tolist()
    count = max(1, len(io) // HELD_OUT)
    held_out, seen = shuffled[:count], shuffled[count:] or shuffled
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    schedule = LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)

    def loss(i: int, softness: float = 0.0) -> Tensor:
        weights = {name: quantizer(softness) for name, quantizer in quantizers.items()}
        with quantized_inputs(block.module, served):
            given = _replay(io.calls[i], block.module, weights, target.inputs[i].to(io.device))
        wanted = io.tokens(i, target.targets[i].to(io.device))
        lengths = wanted.square().mean(1).clamp(min=torch.finfo(wanted.dtype).eps)
        return ((io.tokens(i, given) - wanted).square().mean(1) / lengths).mean()

    before = best = _mean(loss, held_out)
    best_step, results = 0, {name: quantizer.tensor() for name, quantizer in quantizers.items()}
    order: list[int] = []
    for step in range(1, steps + 1):
        order = order or [seen[i] for i in torch.randperm(len(seen), generator=generator).tolist()]
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


def record(block: Block, result: Result) -> None:
    """Put the result into the figures of the block's linears; what the quantizer recorded there is about its own result."""
    for linear in block.linears:
        linear.figures = {f"{k}{BEFORE_TRAINING}" if k in OF_A_LAYER else k: v for k, v in linear.figures.items()} | {
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
    """The block's output with other `weights` `[out, in]` of its linears."""
    placed = {
        f"{name}.weight": weight.T if isinstance(module.get_submodule(name), Conv1D) else weight
        for name, weight in weights.items()
    }
    return call.replay(lambda *args, **kwargs: functional_call(module, placed, args, kwargs), hidden)

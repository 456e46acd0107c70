"""Channel links of a block, found by experiment: no table of architectures, no module names.

A producer (a norm or a linear layer) is linked to its consumers if scaling one of its output channels scales the consumers'
input channels by exactly that factor. The experiment multiplies a producer's output by powers of two, which floating point
carries through products exactly, and compares the inputs of all other modules before and after. The link is accepted only if
no other module reads the output: with the factors undone at the consumers' inputs, the block's output must not change. This
excludes routers, parallel branches and residual connections without a rule for any of them.

For linear producers only the first token of each row is compared. It attends to itself alone, so queries and keys do not
affect it, and a fused projection shows its value rows in whatever layout they are stored.
"""

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model.architecture import find_linears
from ..runner import Call
from .probing import (
    TOLERANCE,
    Trial,
    difference,
    is_norm,
    map_first_argument,
    outputs_match,
    scaled_input,
    scaled_output,
)

SCREENING_RUNS = 6  # after this many runs, pairs that have shown no exact factor are dropped
EVIDENCE_BITS = 8  # runs beyond those that identify a row: the probability of a chance match is 2**-EVIDENCE_BITS
Kind = Literal["norm", "offset-norm", "linear"]


@dataclass(frozen=True)
class Consumer:
    """A parameter that multiplies the producer's channels: they run along `axis` of `parameter` of `module`."""

    module: str
    parameter: str
    axis: int


@dataclass(frozen=True)
class ChannelLink:
    """A module and all modules that read its output channels. Module names are relative to the block.

    producer   the module that scales these channels
    kind       `norm`: output `weight * x (+ bias)`; `offset-norm`: `(1 + weight) * x`; `linear`: a linear layer's rows
    consumers  the parameters that multiply the channels; no other module reads the producer's output
    channels   int64 `[width]`: for each input channel of the consumers, the producer's output channel. With grouped-query
               attention one output channel serves several input channels. -1 if the input was always zero, so that the
               producer's channel is unknown
    size       number of output channels of the producer
    """

    producer: str
    kind: Kind
    consumers: tuple[Consumer, ...]
    channels: Tensor
    size: int


@torch.no_grad()
def find_channel_links(block: nn.Module, call: Call, hidden: Tensor) -> list[ChannelLink]:
    """Every link of the materialised `block`, in the order in which the producers run.

    `call` holds the arguments that the model calls the block with on rows like `hidden` `[rows, length, width]`; the length
    must be at least 2.
    """
    trial = Trial(block, call, hidden)
    links = []
    for name in trial.order:
        module = block.get_submodule(name)
        found = _norm_link(trial, name, module) if is_norm(module) else _linear_link(trial, name, module)
        if found is not None and _has_no_other_consumer(trial, found):
            links.append(found)
    return links


@torch.no_grad()
def query_key_linears(block: nn.Module, call: Call, hidden: Tensor, links: list[ChannelLink]) -> set[str]:
    """Names of the linears that compute queries or keys, alone or fused with the values.

    Changing their output changes the block's output at later tokens of a row, but not at the first one.
    """
    trial = Trial(block, call, hidden)
    found = set()
    for name, module in find_linears(block).items():
        if name not in trial.inputs or not trial.sees_all_tokens(name):
            continue
        factor = torch.randn(trial.outputs[name].shape[-1], generator=torch.Generator().manual_seed(0))
        for link in links:
            if link.producer == name:
                factor[link.channels[link.channels >= 0]] = 1.0
        with scaled_output(module, factor.to(hidden)):
            output = trial.run()
        first = difference(output[:, :1], trial.output[:, :1])
        if first < TOLERANCE < difference(output[:, 1:], trial.output[:, 1:]):
            found.add(name)
    return found


def _norm_link(trial: Trial, name: str, module: nn.Module) -> ChannelLink | None:
    output = trial.outputs[name]
    factor = _powers(output.shape[-1], seed=0).to(output)
    kind = _norm_kind(trial, name, module, factor)
    if kind is None:
        return None
    modules = _consumer_modules(trial, name, factor)
    consumers: list[Consumer] = []
    for consumer in sorted(modules, key=lambda n: not trial.sees_all_tokens(n)):
        found = _compensating_parameters(trial, consumer, factor)
        if found is None:
            return None
        consumers += found
    consumers += _idle_experts(trial, consumers)
    return ChannelLink(name, kind, tuple(consumers), torch.arange(len(factor)), len(factor)) if consumers else None


def _consumer_modules(trial: Trial, name: str, factor: Tensor) -> list[str]:
    """The modules that read the norm's output: their inputs are scaled by exactly `factor`.

    A router with scaled inputs would send tokens to other experts, so the factors are undone at the inputs of the consumers
    found so far, and the search is repeated until it finds no new one.
    """
    candidates = {n: x for n, x in trial.inputs.items() if n != name and x.shape[-1] == len(factor)}
    consumers: list[str] = []
    while True:
        with ExitStack() as stack:
            stack.enter_context(scaled_output(trial.modules[name], factor))
            for consumer in consumers:
                stack.enter_context(scaled_input(trial.modules[consumer], 1 / factor))
            inputs = trial.record_inputs([n for n in candidates if n not in consumers])
        new = [
            n for n, x in inputs.items() if x.shape == candidates[n].shape and torch.equal(x, candidates[n] * factor)
        ]
        if not new:
            return consumers
        consumers += new


def _idle_experts(trial: Trial, consumers: list[Consumer]) -> list[Consumer]:
    """The same parameters of experts that received no token: modules whose names differ from a consumer's in numbers only."""
    found = []
    shapes = {(re.sub(r"\d+", "#", c.module), c.parameter, c.axis) for c in consumers}
    for name in trial.modules.keys() - trial.called:
        for pattern, parameter, axis in sorted(shapes):
            if re.sub(r"\d+", "#", name) == pattern:
                found.append(Consumer(name, parameter, axis))
    return sorted(found, key=lambda c: c.module)


def _norm_kind(trial: Trial, name: str, module: nn.Module, factor: Tensor) -> Kind | None:
    """The kind of norm, found by which change of its weight scales its output by `factor`; None if neither does."""
    args, kwargs = trial.calls[name]
    scaled = trial.outputs[name] * factor
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    forms: dict[Kind, Tensor] = {"norm": weight * factor, "offset-norm": (1 + weight) * factor - 1}
    for kind, changed in forms.items():
        parameters = {"weight": changed} | ({"bias": bias * factor} if isinstance(bias, Tensor) else {})
        if difference(torch.func.functional_call(module, parameters, args, kwargs), scaled) < TOLERANCE:
            return kind
    return None


def _compensating_parameters(trial: Trial, name: str, factor: Tensor) -> list[Consumer] | None:
    """The parameters of a consumer that can compensate a factor at its input; None if there are none."""
    module = trial.modules[name]
    if isinstance(module, nn.Linear | Conv1D):
        return [Consumer(name, "weight", 0 if isinstance(module, Conv1D) else 1)]
    args, kwargs = trial.calls[name]
    scaled = map_first_argument(args, kwargs, lambda x: x * factor)
    own = dict(module.named_parameters(recurse=False))
    candidates = [(n, axis) for n, p in own.items() if p.ndim > 1 for axis in (p.ndim - 1, p.ndim - 2)]
    candidates = [(n, axis) for n, axis in candidates if own[n].shape[axis] == len(factor)]
    reference = module(*args, **kwargs)
    for count in range(1, len(candidates) + 1):
        for chosen in combinations(candidates, count):
            undone = {n: own[n] / factor.reshape([-1] + [1] * (own[n].ndim - 1 - axis)) for n, axis in chosen}
            if outputs_match(torch.func.functional_call(module, undone, *scaled), reference):
                return [Consumer(name, n, axis) for n, axis in chosen]
    return None


def _linear_link(trial: Trial, name: str, module: nn.Module) -> ChannelLink | None:
    """The link from the linear's output rows to the input channels of other linears, or None.

    Every row gets a random codeword of bits; in run i the rows whose i-th bit is set are doubled. A channel that was doubled
    in exactly the runs of one row reads that row. Runs in which a channel took another factor (a gate in the same fused
    matrix was doubled as well) are ignored for that channel.
    """
    size = trial.outputs[name].shape[-1]
    enough = math.ceil(math.log2(size)) + EVIDENCE_BITS
    codes = torch.rand(4 * enough, size, generator=torch.Generator().manual_seed(1)) < 0.5
    later = trial.order[trial.order.index(name) + 1 :]
    later = [n for n in later if not is_norm(trial.modules[n]) and trial.sees_all_tokens(n)]
    before = {n: trial.first_tokens(trial.inputs[n]) for n in later}
    evidence: dict[str, list[Tensor]] = {n: [] for n in before}  # per run `[width]`: 1 doubled, 0 unchanged, -1 neither
    found: dict[str, Tensor] = {}
    for count, code in enumerate(codes, start=1):
        with scaled_output(module, torch.where(code, 2.0, 1.0).to(trial.output)):
            inputs = trial.record_inputs(evidence)
        for n, x in inputs.items():
            evidence[n].append(_doubled(trial.first_tokens(x), before[n]))
        if count == SCREENING_RUNS:
            evidence = {n: runs for n, runs in evidence.items() if (torch.stack(runs) == 1).any()}
        if not evidence:
            return None
        if count >= enough and (count % 4 == 0 or count == len(codes)):
            decoded = {n: _decode(torch.stack(runs), codes[:count], enough, before[n]) for n, runs in evidence.items()}
            found = {n: channels for n, channels in decoded.items() if channels is not None}
            if len(found) == len(evidence):
                break
    if not found:
        return None
    channels = next(iter(found.values()))
    if not all(torch.equal(channels, other) for other in found.values()):
        return None
    consumers = [Consumer(n, "weight", 0 if isinstance(trial.modules[n], Conv1D) else 1) for n in found]
    return ChannelLink(name, "linear", tuple(consumers), channels, size)


def _doubled(now: Tensor, before: Tensor) -> Tensor:
    """Per channel of `[samples, width]`: 1 if every sample doubled, 0 if none changed, -1 otherwise."""
    alive = before != 0
    doubled, unchanged = ((now == 2 * before) | ~alive).all(0), ((now == before) | ~alive).all(0)
    return torch.where(unchanged, 0, torch.where(doubled, 1, -1)).masked_fill(~alive.any(0), -1).cpu()


def _decode(evidence: Tensor, codes: Tensor, enough: int, before: Tensor) -> Tensor | None:
    """The row that each channel reads, int64 `[width]`, from `evidence` `[runs, width]` and `codes` bool `[runs, rows]`.

    At least `enough` runs must agree with the row and none may contradict it. -1 for channels that were always zero; None if
    any other channel matches no row.
    """
    valid = (evidence >= 0).float()
    bits, words = (evidence == 1).float(), codes.float()
    contradictions = (valid - bits).T @ words + bits.T @ (1 - words)  # [width, rows]: number of runs
    fits = contradictions == 0
    known = (valid.sum(0) >= enough) & (fits.sum(1) == 1) & bits.any(0)
    dead = (before == 0).all(0).cpu()
    if not bool((known | dead).all()) or not bool(known.any()):
        return None
    return torch.where(known, fits.float().argmax(1), -1)


def _has_no_other_consumer(trial: Trial, link: ChannelLink) -> bool:
    """Whether factors at the producer, undone at the consumers' inputs, leave the block's output unchanged."""
    factor = torch.ones(link.size)
    used = link.channels[link.channels >= 0].unique()
    factor[used] = _powers(len(used), seed=2)
    undo = 1 / torch.where(link.channels >= 0, factor[link.channels], 1.0)
    with ExitStack() as stack:
        stack.enter_context(scaled_output(trial.modules[link.producer], factor.to(trial.output)))
        for name in dict.fromkeys(consumer.module for consumer in link.consumers):
            stack.enter_context(scaled_input(trial.modules[name], undo.to(trial.output)))
        return difference(trial.run(), trial.output) < TOLERANCE


def _powers(size: int, seed: int) -> Tensor:
    """Random factors 1/2, 1 and 2."""
    return 2.0 ** torch.randint(-1, 2, (size,), generator=torch.Generator().manual_seed(seed))

"""Who links whom in a block, found by experiment: no table of architectures, no names.

A source (a norm, a linear layer) links consumers when scaling one of its output channels scales the consumers' input
channels by just that factor. The experiment multiplies a source's output by powers of two, which floating point carries
through products exactly, and looks who sees them. Nobody else may: undone at the consumers' doors, the factors must leave
the block's output as it was. That excludes routers, parallel branches and residuals without knowing of any of them.

For linear sources, looking at the first token of a row is enough and makes it simple: it attends to itself alone, so
queries and keys have no say there, and a fused projection shows its value rows however they are laid out.
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
from .probing import TOLERANCE, Trial, difference, map_first_argument, is_norm, outputs_match, scaled_input, scaled_output

SCREENING_RUNS = 6  # runs after which a pair that has shown no exact factor is given up
EVIDENCE_BITS = 8  # bits of evidence beyond those that name a row: agreement by chance is 1 in 2**EVIDENCE_BITS
Kind = Literal["norm", "offset-norm", "linear"]


@dataclass(frozen=True)
class Consumer:
    """A parameter that multiplies the fed channels: axis `axis` of `parameter` of `module` runs over them."""

    module: str
    parameter: str
    axis: int


@dataclass(frozen=True)
class ChannelLink:
    """`source` alone scales what `consumers` read, and nobody else reads it. Names are those inside the block.

    kind      `norm`: output `weight * x (+ bias)`; `offset-norm`: `(1 + weight) * x`; `linear`: a linear layer's rows
    channels  int64 `[width]`: the source's output channel behind each input channel of the consumers. Under grouped
              queries one channel stands behind several; -1 where the input was always zero, so that nothing is known
    size      output channels of the source
    """

    source: str
    kind: Kind
    consumers: tuple[Consumer, ...]
    channels: Tensor
    size: int


@torch.no_grad()
def find_channel_links(block: nn.Module, call: Call, hidden: Tensor) -> list[ChannelLink]:
    """Every link of the materialised `block`, in the order in which the sources run.

    `call` is how the model calls the block on rows like `hidden` `[rows, length, width]`, length at least 2.
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
    """Linears with rows that only decide where attention looks: queries and keys, alone or fused with the values.

    Such rows do not matter to a row's first token and do matter to later ones.
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
    readers = _consumer_modules(trial, name, factor)
    consumers: list[Consumer] = []
    for reader in sorted(readers, key=lambda n: not trial.sees_all_tokens(n)):
        found = _compensating_parameters(trial, reader, factor)
        if found is None:
            return None
        consumers += found
    consumers += _idle_experts(trial, consumers)
    return ChannelLink(name, kind, tuple(consumers), torch.arange(len(factor)), len(factor)) if consumers else None


def _consumer_modules(trial: Trial, name: str, factor: Tensor) -> list[str]:
    """The modules that read the norm's output: those who see its factors exactly.

    A router that sees them sends tokens elsewhere, so they are undone at the doors of the readers known so far, and the
    search goes on until nobody new turns up.
    """
    candidates = {n: x for n, x in trial.inputs.items() if n != name and x.shape[-1] == len(factor)}
    readers: list[str] = []
    while True:
        with ExitStack() as stack:
            stack.enter_context(scaled_output(trial.modules[name], factor))
            for reader in readers:
                stack.enter_context(scaled_input(trial.modules[reader], 1 / factor))
            seen = trial.record_inputs([n for n in candidates if n not in readers])
        new = [n for n, x in seen.items() if x.shape == candidates[n].shape and torch.equal(x, candidates[n] * factor)]
        if not new:
            return readers
        readers += new


def _idle_experts(trial: Trial, consumers: list[Consumer]) -> list[Consumer]:
    """The same parameters of modules that got no token in the experiment, but stand in a row with a consumer: idle experts."""
    found = []
    shapes = {(re.sub(r"\d+", "#", c.module), c.parameter, c.axis) for c in consumers}
    for name in trial.modules.keys() - trial.called:
        for pattern, parameter, axis in sorted(shapes):
            if re.sub(r"\d+", "#", name) == pattern:
                found.append(Consumer(name, parameter, axis))
    return sorted(found, key=lambda c: c.module)


def _norm_kind(trial: Trial, name: str, module: nn.Module, factor: Tensor) -> Kind | None:
    """Which way of scaling the weight scales the output, told by the module's behaviour."""
    args, kwargs = trial.calls[name]
    wanted = trial.outputs[name] * factor
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    forms: dict[Kind, Tensor] = {"norm": weight * factor, "offset-norm": (1 + weight) * factor - 1}
    for kind, changed in forms.items():
        swaps = {"weight": changed} | ({"bias": bias * factor} if isinstance(bias, Tensor) else {})
        if difference(torch.func.functional_call(module, swaps, args, kwargs), wanted) < TOLERANCE:
            return kind
    return None


def _compensating_parameters(trial: Trial, name: str, factor: Tensor) -> list[Consumer] | None:
    """The parameters of a reader that make up for its input's factor; None where none do."""
    module = trial.modules[name]
    if isinstance(module, nn.Linear | Conv1D):
        return [Consumer(name, "weight", 0 if isinstance(module, Conv1D) else 1)]
    args, kwargs = trial.calls[name]
    scaled = map_first_argument(args, kwargs, lambda x: x * factor)
    own = dict(module.named_parameters(recurse=False))
    places = [(n, axis) for n, p in own.items() if p.ndim > 1 for axis in (p.ndim - 1, p.ndim - 2)]
    places = [(n, axis) for n, axis in places if own[n].shape[axis] == len(factor)]
    reference = module(*args, **kwargs)
    for count in range(1, len(places) + 1):
        for chosen in combinations(places, count):
            undone = {n: own[n] / factor.reshape([-1] + [1] * (own[n].ndim - 1 - axis)) for n, axis in chosen}
            if outputs_match(torch.func.functional_call(module, undone, *scaled), reference):
                return [Consumer(name, n, axis) for n, axis in chosen]
    return None


def _linear_link(trial: Trial, name: str, module: nn.Module) -> ChannelLink | None:
    """Which row of the linear stands behind each input channel of which other linear.

    Every row gets a random codeword; run by run, rows are doubled where their codeword says so. A channel that was doubled
    exactly when one row was follows that row. Runs in which a channel took another factor (a gate that shares the fused
    matrix was doubled too) say nothing about it.
    """
    size = trial.outputs[name].shape[-1]
    certain = math.ceil(math.log2(size)) + EVIDENCE_BITS
    codes = torch.rand(4 * certain, size, generator=torch.Generator().manual_seed(1)) < 0.5
    behind = trial.order[trial.order.index(name) + 1 :]
    behind = [n for n in behind if not is_norm(trial.modules[n]) and trial.sees_all_tokens(n)]
    before = {n: trial.first_tokens(trial.inputs[n]) for n in behind}
    evidence: dict[str, list[Tensor]] = {n: [] for n in before}  # [code] of [width]: 1 or 0 doubled or not, -1 neither
    found: dict[str, Tensor] = {}
    for count, code in enumerate(codes, start=1):
        with scaled_output(module, torch.where(code, 2.0, 1.0).to(trial.output)):
            seen = trial.record_inputs(evidence)
        for n, x in seen.items():
            evidence[n].append(_doubled(trial.first_tokens(x), before[n]))
        if count == SCREENING_RUNS:
            evidence = {n: runs for n, runs in evidence.items() if (torch.stack(runs) == 1).any()}
        if not evidence:
            return None
        if count >= certain and (count % 4 == 0 or count == len(codes)):
            followed = {
                n: _decode(torch.stack(runs), codes[:count], certain, before[n]) for n, runs in evidence.items()
            }
            found = {n: channels for n, channels in followed.items() if channels is not None}
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
    """Per channel of `[samples, width]`: 1 where every sample doubled, 0 where none changed, -1 otherwise."""
    alive = before != 0
    double, same = ((now == 2 * before) | ~alive).all(0), ((now == before) | ~alive).all(0)
    return torch.where(outputs_match, 0, torch.where(double, 1, -1)).masked_fill(~alive.any(0), -1).cpu()


def _decode(evidence: Tensor, codes: Tensor, certain: int, before: Tensor) -> Tensor | None:
    """The row that each channel follows: `evidence` `[codes, width]`, `codes` bool `[codes, rows]`, gives int64 `[width]`.

    `certain` runs must speak for it. -1 for channels that were always zero; None where a living channel follows no row.
    """
    says = (evidence >= 0).float()
    bits, words = (evidence == 1).float(), codes.float()
    wrong = (says - bits).T @ words + bits.T @ (1 - words)  # [width, rows]: runs that speak against the row
    fits = wrong == 0
    known = (says.sum(0) >= certain) & (fits.sum(1) == 1) & bits.any(0)
    dead = (before == 0).all(0).cpu()
    if not bool((known | dead).all()) or not bool(known.any()):
        return None
    return torch.where(known, fits.float().argmax(1), -1)


def _has_no_other_consumer(trial: Trial, link: ChannelLink) -> bool:
    """Whether factors at the source, undone at the consumers' inputs, leave the block's output alone."""
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

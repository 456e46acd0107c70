"""Gathering: one Hessian for each distinct input of a block's linears, and where the original model walks along, the drifts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CompressError
from ..model.architecture import weight_of
from .drift import Drift
from .hessian import Hessian


@dataclass
class Statistics:
    """Statistics by linear name; linears that read the same tensor share a Hessian, `groups` lists them in order of use.

    `drifts` are there where the original model walks along, for linears that see every token; `held` tells of
    the tokens that were held out, which the others count too.
    """

    hessians: dict[str, Hessian] = field(default_factory=dict)
    drifts: dict[str, Drift] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    held: dict[str, "HeldOut"] = field(default_factory=dict)

    def hold(self, part: "Statistics") -> None:
        """Count what `part` was gathered from too, and keep it as `held`, for linears that both have seen tokens of."""
        for group in part.groups:
            theirs, ours = part.hessians[group[0]], self.hessians[group[0]]
            if theirs.sequences and ours.sequences:
                ours.merge(theirs)
                self.held |= {name: HeldOut(theirs, part.drifts.get(name)) for name in group}
            elif theirs.sequences:
                self.hessians |= dict.fromkeys(group, theirs)
        for name, drift in part.drifts.items():
            self.drifts[name].merge(drift)


@dataclass(frozen=True)
class HeldOut:
    """The statistics of one linear on the tokens that were held out."""

    hessian: Hessian
    drift: Drift | None


class SharedInputs:
    """Which linears read the same tensor: the first pass that they take part in tells, by the identity of their inputs."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self._leaders: dict[str, str] = {}
        self._seen: list[tuple[Tensor, str]] = []  # inputs of this pass, held so that identities stay unique

    def note(self, name: str, inputs: Tensor) -> None:
        """The linear `name` reads `inputs` now."""
        if name not in self._leaders:
            self._join(name, next((self._leaders[other] for tensor, other in self._seen if tensor is inputs), name))
        self._seen.append((inputs, name))

    def leader(self, name: str) -> str:
        """The first of the linears that read what `name` reads."""
        return self._leaders[name]

    def take(self) -> list[tuple[Tensor, str]]:
        """What was read in this pass, in order; the next pass begins."""
        seen, self._seen = self._seen, []
        return seen

    def _join(self, name: str, leader: str) -> None:
        self._leaders[name] = leader
        if leader == name:
            self.groups.append([])
        next(group for group in self.groups if not group or leader in group).append(name)


class StatisticsCollector:
    """Adds what the `linears` read, pass after pass, to the statistics."""

    def __init__(self, linears: dict[str, nn.Module], dtype: torch.dtype) -> None:
        self._linears, self._dtype, self._sharing = linears, dtype, SharedInputs()
        self.statistics = Statistics(groups=self._sharing.groups)

    @contextmanager
    def one_pass(self, mask: Tensor | None, sequences: int) -> Iterator[None]:
        """While the context is open the block runs on `sequences` rows; `mask` marks their real tokens."""
        hessians = self.statistics.hessians

        def gather(name: str, inputs: Tensor) -> None:
            self._sharing.note(name, inputs)
            leader = self._sharing.leader(name)
            if name not in hessians:
                fresh = leader == name
                hessians[name] = Hessian(inputs.shape[-1], self._dtype, inputs.device) if fresh else hessians[leader]
            if leader == name:
                hessians[name].update(_tokens(name, inputs, mask), sequences)

        with observing(self._linears, gather):
            yield

    def drift(
        self, landed: dict[str, Tensor], intended: dict[str, Tensor], mask: Tensor | None, sequences: int
    ) -> None:
        """Add to the drifts what the outputs of the last pass landed in, here and in the original model; forget its inputs."""
        drifts = self.statistics.drifts
        for inputs, name in self._sharing.take():
            there = intended.get(name)
            if there is None or inputs.ndim != 3:  # tokens routed to experts have no counterpart to compare with
                continue
            if name not in drifts:
                rows, columns = weight_of(self._linears[name]).shape
                drifts[name] = Drift(rows, columns, self._dtype, inputs.device)
            lacking = _tokens(name, there - landed[name], mask)
            drifts[name].update(lacking, _tokens(name, inputs, mask), sequences)

    def finish(self, block: str, device: torch.device) -> Statistics:
        """The statistics, checked; a linear that read nothing (an expert that no token was routed to) has the identity.

        Raises `CompressError` naming a linear of `block` whose inputs are not finite.
        """
        found = self.statistics
        for name, hessian in found.hessians.items():
            if not hessian.diagonal().isfinite().all():
                raise CompressError(
                    f"the inputs of {block}.{name} are not finite on the calibration rows",
                    "check the model and the calibration data; a float16 model may have overflowed",
                )
        for name in [n for n in self._linears if n not in found.hessians]:
            found.hessians[name] = Hessian.unseen(weight_of(self._linears[name]).shape[1], self._dtype, device)
            found.groups.append([name])
        return found


@contextmanager
def observing(linears: dict[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While the context is open, `note` is told the name and the input of each of the `linears` before it runs."""

    def hook(name: str) -> Any:
        return lambda module, args: note(name, args[0])

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _tokens(name: str, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The values at real tokens `[tokens, width]`: padding never enters a statistic."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    if mask is None:
        return flat
    if flat.shape[0] != mask.numel():
        raise CompressError(f"{name} sees {flat.shape[0]} routed tokens, which a padding mask cannot follow")
    return flat[mask.reshape(-1).bool()]

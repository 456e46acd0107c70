"""Collecting statistics: one Hessian per distinct input of a block's linears, and drifts if the original model is run too."""

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
    """Statistics by linear name.

    hessians  linears that read the same tensor share one
    drifts    if the original model is run too: of the linears that read every token
    groups    names of the linears that read the same tensor, in order of use
    held_out  the statistics of the held-out tokens, which `hessians` and `drifts` include
    """

    hessians: dict[str, Hessian] = field(default_factory=dict)
    drifts: dict[str, Drift] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    held_out: dict[str, "HeldOut"] = field(default_factory=dict)

    def add_held_out(self, part: "Statistics") -> None:
        """Add the held-out statistics `part`, and keep them in `held_out` too for linears that have tokens in both parts."""
        for group in part.groups:
            theirs, ours = part.hessians[group[0]], self.hessians[group[0]]
            if theirs.sequences and ours.sequences:
                ours.merge(theirs)
                self.held_out |= {name: HeldOut(theirs, part.drifts.get(name)) for name in group}
            elif theirs.sequences:
                self.hessians |= dict.fromkeys(group, theirs)
        for name, drift in part.drifts.items():
            self.drifts[name].merge(drift)


@dataclass(frozen=True)
class HeldOut:
    """The statistics of one linear on the held-out tokens; `drift` is None if there is none."""

    hessian: Hessian
    drift: Drift | None


class SharedInputs:
    """Groups of linears that read the same tensor, by the identity of their inputs in the first pass that calls them."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self._leaders: dict[str, str] = {}
        self._inputs: list[tuple[Tensor, str]] = []  # of this pass, kept alive so that identities stay unique

    def note(self, name: str, inputs: Tensor) -> None:
        """Record that the linear `name` reads `inputs` in this pass."""
        if name not in self._leaders:
            self._join(name, next((self._leaders[other] for tensor, other in self._inputs if tensor is inputs), name))
        self._inputs.append((inputs, name))

    def leader(self, name: str) -> str:
        """The first linear of the group of `name`."""
        return self._leaders[name]

    def end_pass(self) -> list[tuple[Tensor, str]]:
        """End this pass: its inputs and the linears that read them, in order."""
        inputs, self._inputs = self._inputs, []
        return inputs

    def _join(self, name: str, leader: str) -> None:
        self._leaders[name] = leader
        if leader == name:
            self.groups.append([])
        next(group for group in self.groups if not group or leader in group).append(name)


class StatisticsCollector:
    """Accumulates the statistics of `linears` over passes of the block, in `dtype` (float32 or float64)."""

    def __init__(self, linears: dict[str, nn.Module], dtype: torch.dtype) -> None:
        self._linears, self._dtype, self._shared = linears, dtype, SharedInputs()
        self.statistics = Statistics(groups=self._shared.groups)

    @contextmanager
    def one_pass(self, mask: Tensor | None, sequences: int) -> Iterator[None]:
        """Add the inputs of the linears while the context is open, in which the block runs once on `sequences` rows.

        `mask` bool `[rows, length]` marks the real tokens; None if all are.
        """
        hessians = self.statistics.hessians

        def add(name: str, inputs: Tensor) -> None:
            self._shared.note(name, inputs)
            leader = self._shared.leader(name)
            if name not in hessians:
                first = leader == name
                hessians[name] = Hessian(inputs.shape[-1], self._dtype, inputs.device) if first else hessians[leader]
            if leader == name:
                hessians[name].update(_tokens(name, inputs, mask), sequences)

        with observing(self._linears, add):
            yield

    def drift(
        self, outputs: dict[str, Tensor], reference: dict[str, Tensor], mask: Tensor | None, sequences: int
    ) -> None:
        """End the pass: add the difference between its residual targets and those of the original model to the drifts.

        `outputs` and `reference` are the results of `residual_targets` for the compressed and the original block.
        """
        drifts = self.statistics.drifts
        for inputs, name in self._shared.end_pass():
            wanted = reference.get(name)
            if wanted is None or inputs.ndim != 3:  # tokens routed to experts have no counterpart to compare with
                continue
            if name not in drifts:
                rows, columns = weight_of(self._linears[name]).shape
                drifts[name] = Drift(rows, columns, self._dtype, inputs.device)
            difference = _tokens(name, wanted - outputs[name], mask)
            drifts[name].update(difference, _tokens(name, inputs, mask), sequences)

    def finish(self, block: str, device: torch.device) -> Statistics:
        """The statistics. A linear without tokens (an expert that no token was routed to) gets the identity as Hessian.

        Raises `CompressError` with the linear's name if its inputs are not finite; `block` is the block's name.
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
    """While the context is open, `note(name, input)` is called before each of the `linears` runs."""

    def hook(name: str) -> Any:
        return lambda module, args: note(name, args[0])

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _tokens(name: str, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The values at real tokens `[tokens, width]`; padding is left out of all statistics."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    if mask is None:
        return flat
    if flat.shape[0] != mask.numel():
        raise CompressError(
            f"{name} reads {flat.shape[0]} routed tokens, to which a padding mask of {mask.numel()} tokens does not apply"
        )
    return flat[mask.reshape(-1).bool()]

"""The calibration runner: walks the blocks of a model in order, one in memory at a time.

It records what the model hands to every block (hidden states, masks, rotary tables, ...) on the calibration rows, replays
each block with exactly those arguments, gathers statistics of the linears' inputs, and feeds a block's output onwards.
Where a pass asks for the drift, the original model walks along: a second stream through a copy of each block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import CompressError
from .activation_store import ActivationStore, snapshot
from .data.token_rows import TokenRows
from .model.architecture import find_blocks, find_linears
from .model.skeleton import Names, materialise, outside, release
from .model.source import Source
from .statistics.collect import SharedInputs, Statistics, StatisticsCollector, observing
from .statistics.drift import residual_targets

TOKENS_PER_BATCH = 4096
HELD_OUT = 8  # of so many batches the last is held out where a pass chooses by it
TOKENS_PER_STEP, FEWEST_STEPS = 1024, 8  # batches that a gradient is taken of: small, and enough to hold some out


class _LastBlockReached(Exception):
    """The forward pass has come to the last block: nothing after it is needed."""


@dataclass(frozen=True)
class Call:
    """How the model calls a block: all arguments but the hidden states, verbatim."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's output hidden states for the input `hidden` `[rows, length, width]`."""
        out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True)
class BlockIO:
    """What one block reads and gives on the calibration rows, batch by batch; all of it is read anew when asked for.

    `inputs` are the hidden states `[rows, length, width]` that the compressed model hands to the block, `reference` those of
    the original model, `original` is the block as it was. `masks` mark the real tokens; None where there is no padding.
    """

    calls: Sequence[Call]
    inputs: ActivationStore
    reference: ActivationStore
    original: nn.Module
    masks: Sequence[Tensor] | None
    device: torch.device
    scratch: Path

    def __len__(self) -> int:
        return len(self.calls)

    def tokens(self, i: int, values: Tensor) -> Tensor:
        """The values `[rows, length, width]` of batch `i` at real tokens: `[tokens, width]`."""
        flat = values.flatten(0, 1)
        return flat if self.masks is None else flat[self.masks[i].to(flat.device).flatten().bool()]


class Runner:
    """Walks `model`, a skeleton of `source`, over the calibration `rows`; without rows it only loads and unloads blocks.

    Hidden states are float32 and lie in `scratch` when they are many. `blocks` are the decoder blocks, `prefix` their name.
    With `reference` the original model walks along, so that the drift can be gathered; with `small_batches` there are as many
    as the steps of a training want.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Source,
        rows: TokenRows | None,
        scratch: Path,
        device: str = "cpu",
        reference: bool = False,
        small_batches: bool = False,
    ) -> None:
        self.model, self.source, self.device = model, source, torch.device(device)
        self.names, self._dtype = Names(model, source), model.dtype
        self.prefix, self.blocks = find_blocks(model)
        batch = 1 if rows is None else _batch(rows.ids, small_batches)
        self._ids: tuple[Tensor, ...] = () if rows is None else rows.ids.split(batch)
        self._masks = None if rows is None or rows.mask is None else rows.mask.split(batch)
        self.scratch = scratch
        self._hidden = ActivationStore(scratch)
        self._reference = ActivationStore(scratch / "reference") if reference else None
        self._original: nn.Module | None = None  # the loaded block as it was, for the reference stream
        self._calls: list[list[Call]] = []  # [block][batch]

    def block_name(self, index: int) -> str:
        """The dotted name of block `index`."""
        return f"{self.prefix}.{index}"

    def load(self, index: int) -> nn.Module:
        """Block `index` with its weights in memory."""
        block = self.blocks[index]
        materialise(block, self.block_name(index), self.source, self.names, self.device)
        if self._reference is not None:
            self._original = snapshot(block)
        return block

    def unload(self, index: int) -> None:
        """Forget the weights of block `index`."""
        release(self.blocks[index])
        self._original = None

    @torch.no_grad()
    def capture(self) -> None:
        """Run the model up to its blocks: record the first block's inputs and how every block is called."""
        self._calls = [[] for _ in self.blocks]
        with self._loading_outside_on_demand(), self._blocks_recording():
            for i, ids in enumerate(self._ids):
                try:
                    self.model(input_ids=ids.to(self.device), attention_mask=self._mask(i), use_cache=False)
                except _LastBlockReached:
                    continue
                raise CompressError(f"{type(self.model).__name__} never calls the last of its blocks {self.prefix}")

    @torch.no_grad()
    def groups(self, index: int, wanted: set[str]) -> list[list[str]]:
        """The linears `wanted` of the loaded block `index` by common input, in order of use: a few tokens tell."""
        sharing, linears = SharedInputs(), self._linears(index, wanted)
        with observing(linears, sharing.note):
            self._calls[index][0].replay(self.blocks[index], self._hidden[0].to(self.device))
        return sharing.groups + [[name] for name in linears if not any(name in group for group in sharing.groups)]

    @torch.no_grad()
    def collect(
        self, index: int, wanted: set[str], dtype: torch.dtype = torch.float32, hold_out: bool = False
    ) -> Statistics:
        """Gather the statistics of the linears `wanted` (names inside the block) of the loaded block `index`.

        With `hold_out` those of the last of every `HELD_OUT` batches are kept apart too, if there is more than one batch.
        """
        linears = self._linears(index, wanted)
        every = min(HELD_OUT, len(self._ids)) if hold_out else 1
        kept, held = StatisticsCollector(linears, dtype), StatisticsCollector(linears, dtype)
        for i, call in enumerate(self._calls[index]):
            mask, rows = self._mask(i), len(self._ids[i])
            gatherer = held if every > 1 and i % every == every - 1 else kept
            with gatherer.one_pass(mask, rows), residual_targets(linears if self._original else {}) as landed:
                call.replay(self.blocks[index], self._hidden[i].to(self.device))
            intended: dict[str, Tensor] = {}
            if self._reference is not None and self._original is not None:
                with residual_targets({name: self._original.get_submodule(name) for name in linears}) as intended:
                    call.replay(self._original, self._reference[i].to(self.device))
            gatherer.drift(landed, intended, mask, rows)
        found = kept.finish(self.block_name(index), self.device)
        if every > 1:
            found.hold(held.finish(self.block_name(index), self.device))
        return found

    def update_reference(self, index: int) -> None:
        """Take block `index` as it stands for the original from here on: a transform has rewritten it to the same function."""
        if self._original is not None:
            self._original = snapshot(self.blocks[index])

    def rotate_hidden_states(self, matrix: Tensor) -> None:
        """Multiply the stored hidden states by `matrix` from the right: a transform has turned the whole model's."""
        for store in (self._hidden, self._reference):
            for i in range(0 if store is None else len(store)):
                assert store is not None
                store[i] = (store[i].double() @ matrix.cpu()).float()

    @contextmanager
    def without_blocks(self) -> Iterator[PreTrainedModel]:
        """The model with its weights outside the blocks in memory, and blocks that hand the hidden states on."""
        modules = list(outside(self.model, self.blocks))
        for name, module in modules:
            materialise(module, name, self.source, self.names, self.device)
        as_tuple = self._returns_tuple()
        for block in self.blocks:
            block.forward = lambda hidden_states, *args, **kwargs: (hidden_states,) if as_tuple else hidden_states
        try:
            yield self.model
        finally:
            for block in self.blocks:
                del block.forward
            for _, module in modules:
                release(module)

    def samples(self, index: int) -> Iterator[tuple[Call, Tensor, Tensor | None]]:
        """Batch by batch: how block `index` is called, its stored hidden states, and the mask of real tokens or None."""
        for i, call in enumerate(self._calls[index]):
            yield call, self._hidden[i].to(self.device), self._mask(i)

    def io(self, index: int) -> BlockIO:
        """What the loaded block `index` reads and gives. The runner must have been made with `reference`."""
        assert self._reference is not None and self._original is not None
        return BlockIO(
            self._calls[index],
            self._hidden,
            self._reference,
            self._original,
            self._masks,
            self.device,
            self.scratch / "targets",
        )

    @torch.no_grad()
    def forward(self, index: int) -> None:
        """Replace the stored hidden states by the output of the loaded block `index`."""
        for i, call in enumerate(self._calls[index]):
            self._hidden[i] = call.replay(self.blocks[index], self._hidden[i].to(self.device))
            if self._reference is not None and self._original is not None:
                self._reference[i] = call.replay(self._original, self._reference[i].to(self.device))

    def _mask(self, batch: int) -> Tensor | None:
        return None if self._masks is None else self._masks[batch].to(self.device)

    def _linears(self, index: int, wanted: set[str]) -> dict[str, nn.Module]:
        return {name: module for name, module in find_linears(self.blocks[index]).items() if name in wanted}

    @contextmanager
    def _loading_outside_on_demand(self) -> Iterator[None]:
        """Load a module outside the blocks when it is first called, so that the head and final norm never are."""
        loaded: list[nn.Module] = []

        def load(module: nn.Module, args: object, name: str) -> None:
            if type(module) is nn.Embedding and module.weight.is_meta:
                hooks.append(self._embed_in_stored_dtype(module, name))
                loaded.append(module)
            elif any(p.is_meta for p in module.parameters(recurse=False)):
                materialise(module, name, self.source, self.names, self.device)
                loaded.append(module)

        modules = list(outside(self.model, self.blocks))
        hooks = [module.register_forward_pre_hook(partial(load, name=name)) for name, module in modules]
        for _, module in modules:
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(self.device)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in loaded:
                release(module)
                module.to(self._dtype)  # a table that was kept as stored is one of the skeleton's again

    def _embed_in_stored_dtype(self, table: nn.Embedding, name: str) -> RemovableHandle:
        """Load an embedding as it is stored and widen what is looked up: the widened table would be the largest tensor."""
        materialise(table, name, self.source, self.names, self.device, widen=False)
        return table.register_forward_hook(lambda module, args, found: found.to(self._dtype))

    @contextmanager
    def _blocks_recording(self) -> Iterator[None]:
        """Blocks that note how they are called and pass the hidden states on untouched, in the form that they return."""
        as_tuple = self._returns_tuple()
        for index, block in enumerate(self.blocks):
            block.forward = self._recorder(index, as_tuple)  # an instance attribute shadows the method
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _recorder(self, index: int, as_tuple: bool) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            calls = self._calls[index]
            call = Call(rest, kwargs)
            calls.append(calls[-1] if calls and _equal((calls[-1].args, calls[-1].kwargs), (rest, kwargs)) else call)
            if index == 0:
                self._hidden[len(calls) - 1] = hidden
                if self._reference is not None:
                    self._reference[len(calls) - 1] = hidden
            if index == len(self.blocks) - 1:
                raise _LastBlockReached
            return (hidden,) if as_tuple else hidden

        return record

    def _returns_tuple(self) -> bool:
        """Whether blocks return a tuple: run the first one once on two tokens."""
        answer: list[bool] = []

        def look(module: nn.Module, args: object, output: object) -> None:
            answer.append(isinstance(output, tuple))
            raise _LastBlockReached

        hook = self.load(0).register_forward_hook(look)
        try:
            self.model(input_ids=self._ids[0][:1, :2].to(self.device), use_cache=False)
        except _LastBlockReached:
            pass
        finally:
            hook.remove()
            self.unload(0)
        return answer[0]


def _batch(ids: Tensor, small: bool) -> int:
    """How many of the rows `ids` `[rows, length]` make a batch."""
    rows, length = ids.shape
    most = (TOKENS_PER_STEP if small else TOKENS_PER_BATCH) // length
    return max(1, min(most, rows // FEWEST_STEPS) if small else most)


def _equal(a: Any, b: Any) -> bool:
    """Whether two structures of arguments are equal, tensors by value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (type(a) is type(b) and a == b)

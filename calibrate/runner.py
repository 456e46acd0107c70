"""The calibration runner: runs a model block by block, with one block in memory at a time.

It records the arguments with which the model calls every block (hidden states, masks, rotary tables, ...) on the calibration
rows, replays each block with exactly those arguments, collects statistics of the linears' inputs, and passes a block's output
to the next one. If a pass needs the drift, a copy of each original block is run as well, on the hidden states of the original
model: the reference.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import CompressError
from .activation_store import ActivationStore, snapshot
from .data.token_rows import TokenRows
from .model.architecture import find_blocks, find_linears
from .model.skeleton import Names, assign, materialise, outside, release
from .model.source import Source
from .statistics.collect import SharedInputs, Statistics, StatisticsCollector, observing
from .statistics.drift import residual_targets

TOKENS_PER_BATCH = 4096
HEAD_ROWS = 8192  # of a head that are converted at a time
HELD_OUT = 8  # every 8th batch is held out if a pass chooses by held-out tokens
TOKENS_PER_STEP, FEWEST_STEPS = 1024, 8  # for training: size of a batch, and the number of batches if the rows allow it


class _LastBlockReached(Exception):
    """Ends the forward pass at the last block: nothing after it is needed."""


@dataclass(frozen=True)
class Call:
    """The arguments with which the model calls a block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's output hidden states for the input `hidden` `[rows, length, width]`."""
        out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True)
class BlockIO:
    """Inputs of one block on the calibration rows, by batch; hidden states are read from the stores on every access.

    calls      arguments of the block
    inputs     hidden states `[rows, length, width]` that the compressed model passes to the block
    reference  hidden states `[rows, length, width]` that the original model passes to the block
    original   the block before compression
    masks      bool `[rows, length]`, true at real tokens; None if there is no padding
    scratch    a folder for the targets of a training
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
    """Runs `model`, a skeleton of `source`, on the calibration `rows`; without rows it only loads and unloads blocks.

    `blocks` are the decoder blocks, `prefix` is their dotted name. Hidden states are float32 and are stored in the folder
    `scratch` if they are large. With `reference`, the original model's hidden states are computed as well, which drift
    statistics need. With `small_batches`, batches have the size of a training step.
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
        if rows is not None:
            rows.check_vocabulary(model.config.get_text_config().vocab_size)
        batch = 1 if rows is None else _batch(rows.ids, small_batches)
        self._ids: tuple[Tensor, ...] = () if rows is None else rows.ids.split(batch)
        self._masks = None if rows is None or rows.mask is None else rows.mask.split(batch)
        self.scratch = scratch
        self._hidden = ActivationStore(scratch)
        self._reference = ActivationStore(scratch / "reference") if reference else None
        self._original: nn.Module | None = None  # the loaded block before compression, for the reference
        self._calls: list[list[Call]] = []  # [block][batch]

    def block_name(self, index: int) -> str:
        """The dotted name of block `index`."""
        return f"{self.prefix}.{index}"

    def load(self, index: int) -> nn.Module:
        """Read the weights of block `index`, and return it."""
        block = self.blocks[index]
        materialise(block, self.block_name(index), self.source, self.names, self.device)
        if self._reference is not None:
            self._original = snapshot(block)
        return block

    def unload(self, index: int) -> None:
        """Free the weights of block `index`."""
        release(self.blocks[index])
        self._original = None

    @torch.no_grad()
    def capture(self, rewritten: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Run the model with its blocks skipped; records the first block's inputs and the arguments of every block.

        `rewritten` are parameters outside the blocks that take the place of the checkpoint's, by their names in the model.
        Raises `CompressError` if the model does not call its last block.
        """
        self._calls = [[] for _ in self.blocks]
        with self._loading_outside_on_demand(rewritten), self._blocks_recording():
            for i, ids in enumerate(self._ids):
                try:
                    self.model(input_ids=ids.to(self.device), attention_mask=self._mask(i), use_cache=False)
                except _LastBlockReached:
                    continue
                raise CompressError(f"{type(self.model).__name__} does not call the last of its blocks {self.prefix}")

    @torch.no_grad()
    def groups(self, index: int, wanted: set[str]) -> list[list[str]]:
        """The linears `wanted` of the loaded block `index`, grouped by common input, in order of use on the first batch."""
        shared, linears = SharedInputs(), self._linears(index, wanted)
        with observing(linears, shared.note):
            self._calls[index][0].replay(self.blocks[index], self._hidden[0].to(self.device))
        return shared.groups + [[name] for name in linears if not any(name in group for group in shared.groups)]

    @torch.no_grad()
    def collect(
        self, index: int, wanted: set[str], dtype: torch.dtype = torch.float32, hold_out: bool = False
    ) -> Statistics:
        """Collect the statistics of the linears `wanted` (names inside the block) of the loaded block `index`.

        `dtype` is the one they are accumulated in. With `hold_out` and more than one batch, the statistics of every
        `HELD_OUT`-th batch are also returned on their own. Raises `CompressError` if inputs are not finite.
        """
        linears = self._linears(index, wanted)
        every = min(HELD_OUT, len(self._ids)) if hold_out else 1
        main, held_out = StatisticsCollector(linears, dtype), StatisticsCollector(linears, dtype)
        for i, call in enumerate(self._calls[index]):
            mask, rows = self._mask(i), len(self._ids[i])
            collector = held_out if every > 1 and i % every == every - 1 else main
            with collector.one_pass(mask, rows), residual_targets(linears if self._original else {}) as outputs:
                call.replay(self.blocks[index], self._hidden[i].to(self.device))
            reference: dict[str, Tensor] = {}
            if self._reference is not None and self._original is not None:
                with residual_targets({name: self._original.get_submodule(name) for name in linears}) as reference:
                    call.replay(self._original, self._reference[i].to(self.device))
            collector.drift(outputs, reference, mask, rows)
        statistics = main.finish(self.block_name(index), self.device)
        if every > 1:
            statistics.add_held_out(held_out.finish(self.block_name(index), self.device))
        return statistics

    def update_reference(self, index: int) -> None:
        """Use the present weights of block `index` as the original ones: a transform has rewritten them equivalently."""
        if self._original is not None:
            self._original = snapshot(self.blocks[index])

    def rotate_hidden_states(self, matrix: Tensor) -> None:
        """Multiply all stored hidden states by `matrix` float64 `[width, width]` from the right, after a rotation of the model.

        Computed in float64.
        """
        for store in (self._hidden, self._reference):
            for i in range(0 if store is None else len(store)):
                assert store is not None
                store[i] = (store[i].double() @ matrix.cpu()).float()

    @contextmanager
    def without_blocks(self) -> Iterator[PreTrainedModel]:
        """The model with the weights outside its blocks in memory, and its blocks replaced by the identity."""
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
        """For every batch, the arguments of block `index`, its hidden states, and the mask of real tokens or None."""
        for i, call in enumerate(self._calls[index]):
            yield call, self._hidden[i].to(self.device), self._mask(i)

    def io(self, index: int) -> BlockIO:
        """The inputs of the loaded block `index`. The runner must have been made with `reference`."""
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
        """Replace the stored hidden states by the outputs of the loaded block `index`."""
        for i, call in enumerate(self._calls[index]):
            self._hidden[i] = call.replay(self.blocks[index], self._hidden[i].to(self.device))
            if self._reference is not None and self._original is not None:
                self._reference[i] = call.replay(self._original, self._reference[i].to(self.device))

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The token ids of each batch, int64 `[rows, length]`."""
        return self._ids

    def hidden(self, batch: int) -> Tensor:
        """The stored hidden states of a batch, float32 `[rows, length, width]`."""
        return self._hidden[batch].to(self.device)

    @contextmanager
    def readout(self) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """A function that gives the logits `[tokens, vocabulary]` of hidden states `[tokens, width]` after the last block.

        Its first argument are ids int64 `[1, tokens]`, for models whose code reads them outside the blocks too.
        """
        last = [torch.empty(0)]

        def skip(*args: Any, **kwargs: Any) -> Any:
            return (last[0],) if as_tuple else last[0]

        def logits(ids: Tensor, hidden: Tensor) -> Tensor:
            last[0] = hidden.unsqueeze(0)
            return self.model(input_ids=ids.to(self.device), use_cache=False).logits[0]

        with self._loading_outside_on_demand():
            as_tuple = self._returns_tuple()
            for block in self.blocks:
                block.forward = skip
            try:
                yield logits
            finally:
                for block in self.blocks:
                    del block.forward

    def _mask(self, batch: int) -> Tensor | None:
        return None if self._masks is None else self._masks[batch].to(self.device)

    def _linears(self, index: int, wanted: set[str]) -> dict[str, nn.Module]:
        return {name: module for name, module in find_linears(self.blocks[index]).items() if name in wanted}

    @contextmanager
    def _loading_outside_on_demand(self, rewritten: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[None]:
        """Load a module outside the blocks when it is first called; only `readout` calls the final norm and the head."""
        loaded: list[nn.Module] = []

        def load(module: nn.Module, args: object, name: str) -> None:
            if not any(p.is_meta for p in module.parameters(recurse=False)):
                return
            if type(module) is nn.Embedding:
                hooks.append(self._embed_in_stored_dtype(module, name))
            elif module is head:
                materialise(module, name, self.source, self.names, self.device, widen=False)
            else:
                materialise(module, name, self.source, self.names, self.device)
            loaded.append(module)
            for leaf in module._parameters:
                if f"{name}.{leaf}" in rewritten:
                    assign(module, leaf, rewritten[f"{name}.{leaf}"].to(self.device))

        head = self.model.get_output_embeddings()
        head = head if type(head) is nn.Linear else None
        if head is not None:
            head.forward = partial(_linear_in_slices, head)
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
            if head is not None:
                del head.forward
            for module in loaded:
                release(module)
                module.to(self._dtype)  # embeddings and heads were loaded in their stored dtype

    def _embed_in_stored_dtype(self, table: nn.Embedding, name: str) -> RemovableHandle:
        """Load an embedding in its stored dtype and convert its outputs: converted, it would be the largest tensor."""
        materialise(table, name, self.source, self.names, self.device, widen=False)
        return table.register_forward_hook(lambda module, args, output: output.to(self._dtype))

    @contextmanager
    def _blocks_recording(self) -> Iterator[None]:
        """While the context is open, blocks record their arguments and return the hidden states unchanged."""
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
        """Whether blocks return a tuple, found by running the first one on two tokens."""
        answer: list[bool] = []

        def inspect(module: nn.Module, args: object, output: object) -> None:
            answer.append(isinstance(output, tuple))
            raise _LastBlockReached

        hook = self.load(0).register_forward_hook(inspect)
        try:
            self.model(input_ids=self._ids[0][:1, :2].to(self.device), use_cache=False)
        except _LastBlockReached:
            pass
        finally:
            hook.remove()
            self.unload(0)
        return answer[0]


def _linear_in_slices(head: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002 - the name of the method that it replaces
    """`head(input)`, its weight converted slice by slice: the whole of it would be the largest tensor in memory."""
    parts = [nn.functional.linear(input, rows.to(input.dtype)) for rows in head.weight.split(HEAD_ROWS)]
    y = torch.cat(parts, -1)
    return y if head.bias is None else y + head.bias.to(input.dtype)


def _batch(ids: Tensor, small: bool) -> int:
    """The number of rows per batch, for `ids` `[rows, length]`."""
    rows, length = ids.shape
    most = (TOKENS_PER_STEP if small else TOKENS_PER_BATCH) // length
    return max(1, min(most, rows // FEWEST_STEPS) if small else most)


def _equal(a: Any, b: Any) -> bool:
    """Whether two nested structures of arguments are equal, tensors compared by value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or (type(a) is type(b) and a == b)

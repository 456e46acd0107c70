"""Rotations (QuaRot, offline half): turn the residual stream by a random Hadamard matrix, so that no channel stands out.

    h' = h R       embeddings E R,   writers R^T W and b R,   readers W diag(g) R,   norms without gain
    v' = v R_h     per head: value rows R_h^T W_v, output columns W_o R_h

Only weights change, so that every runtime loads the result. A norm's gain g moves into its readers; a LayerNorm keeps
(b / g) R of its bias, and its R maps the vector of ones to itself, so that subtracting the mean commutes with it. Every
block and the model around the blocks are checked to compute the same (identity I6); a model that cannot be rotated without
run-time operations, such as one with norms behind its writers, is refused.
"""

from functools import lru_cache
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ....calibrate.channel_graph.links import ChannelLink, find_channel_links
from ....calibrate.channel_graph.probing import is_norm
from ....calibrate.model.architecture import find_blocks, find_linears, weight_of
from ....calibrate.model.skeleton import outside
from ....calibrate.runner import Call
from ....errors import CompressError
from ....recipes.methods import Method, Needs
from ....recipes.scheme import Scheme
from ...block import Block
from .hadamard import random_rotation
from .rescale import TOLERANCE, checked, parameter_of, relative_difference

HINT = "leave the rotate pass out: this architecture would need operations at run time"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Rotate:
    """Options of the rotation.

    seed   of the random signs
    heads  also rotate every head's values
    """

    seed: int = 0
    heads: bool = True
    needs: ClassVar[Needs] = Needs(trial=True)
    true_sequential: ClassVar[bool] = False


@torch.no_grad()
def apply(config: Rotate, block: Block) -> None:
    """Rotate a block, which afterwards expects and gives rotated hidden states."""
    assert block.context is not None
    call, hidden = block.context.trial
    feeds = find_channel_links(block.module, call, hidden)
    if config.heads:
        for feed in feeds:
            if feed.kind == "linear":
                rotate_heads(block.module, feed, block.context.head_size, config.seed, call, hidden)
    norms = [block.module.get_submodule(feed.source) for feed in feeds if _on_stream(feed, hidden)]
    rotation = stream_rotation(hidden.shape[-1], config.seed, any(map(subtracts_mean, norms))).to(hidden.device)
    expected = turned(call.replay(block.module, hidden), rotation)
    rotate_stream(block.module, [feed for feed in feeds if _on_stream(feed, hidden)], rotation)
    moved = relative_difference(call.replay(block.module, turned(hidden, rotation)), expected)
    if not moved <= TOLERANCE:
        raise CompressError(f"{block.name} does not compute the same when rotated ({moved:.1e} of its output)", HINT)


def rotate_stream(block: nn.Module, feeds: list[ChannelLink], rotation: Tensor) -> None:
    """Rotate what reads and writes the residual stream; `feeds` are those of the norms on it."""
    readers: dict[str, set[str]] = {}
    for feed in feeds:
        gain = _take_gain(block.get_submodule(feed.source), feed.kind == "offset-norm", rotation)
        for consumer in feed.consumers:
            turn(parameter_of(block, consumer), consumer.axis, gain.unsqueeze(1) * rotation)
            readers.setdefault(consumer.module, set()).add(consumer.parameter)
    for name, linear in find_linears(block).items():
        if name not in readers and weight_of(linear).shape[0] == len(rotation):
            turn(linear.get_parameter("weight"), 1 if isinstance(linear, Conv1D) else 0, rotation)
            if linear.bias is not None:
                turn(linear.get_parameter("bias"), 0, rotation)
    for name, read in readers.items():
        if not isinstance(module := block.get_submodule(name), nn.Linear | Conv1D):
            _turn_written(module, read, rotation)


def rotate_heads(block: nn.Module, feed: ChannelLink, head_size: int, seed: int, call: Call, hidden: Tensor) -> None:
    """Rotate value rows and output columns of every head alike, where `feed` is that pair; other pairs stay as they are."""
    if bool((feed.channels < 0).any()) or len(feed.channels) % head_size:
        return
    rotation = random_rotation(head_size, seed + 1).to(hidden.device)
    source = block.get_submodule(feed.source)
    heads = feed.channels.view(-1, head_size).to(hidden.device)

    def change() -> None:
        for rows in heads.unique(dim=0):  # query heads that share values see them turned once
            weight_of(source)[rows] = (rotation.T @ weight_of(source)[rows].double()).to(hidden.dtype)
            if source.bias is not None:
                bias = source.get_parameter("bias")
                bias[rows] = (bias[rows].double() @ rotation).to(bias.dtype)
        for consumer in feed.consumers:
            every_head = torch.block_diag(*[rotation] * len(heads))
            turn(parameter_of(block, consumer), consumer.axis, every_head)

    parameters = [*source.parameters(recurse=False), *(parameter_of(block, consumer) for consumer in feed.consumers)]
    checked(change, parameters, block, call, hidden)


@torch.no_grad()
def apply_outside(config: Rotate, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, set[str]]:
    """Rotate embeddings, final norm and head of `model`, whose blocks hand their input on; `ids` `[rows, length]` are for the
    check. Returns the rotation of the stream and the names of the parameters that changed. A tied head must be untied."""
    head = model.get_output_embeddings()
    outer = {n: m for n, m in outside(model, find_blocks(model)[1]) if m is not head}
    before = _run(model, ids)
    norms = [n for n, m in outer.items() if is_norm(m) and torch.equal(before.given.get(n, ids), before.read)]
    if head is None or len(norms) != 1:
        raise CompressError(f"no norm directly before the head of {type(model).__name__}", HINT)
    norm = outer[norms[0]]
    rotation = stream_rotation(before.stream.shape[-1], config.seed, subtracts_mean(norm)).to(ids.device)
    embeddings = {n: m for n, m in outer.items() if isinstance(m, nn.Embedding) and m.embedding_dim == len(rotation)}
    for module in embeddings.values():
        turn(module.get_parameter("weight"), 1, rotation)
    gain = _take_gain(norm, _adds_one(norm), rotation)
    turn(head.get_parameter("weight"), 1, gain.unsqueeze(1) * rotation)
    after = _run(model, ids)
    moved = max(
        relative_difference(after.stream, turned(before.stream, rotation)),
        relative_difference(after.logits, before.logits),
    )
    if not moved <= TOLERANCE:
        raise CompressError(
            f"{type(model).__name__} does not compute the same around its rotated blocks ({moved:.1e})", HINT
        )
    head_name = next(n for n, m in model.named_modules() if m is head)
    changed = {f"{n}.weight" for n in [*embeddings, norms[0], head_name]}
    return rotation, changed | ({f"{norms[0]}.bias"} if isinstance(getattr(norm, "bias", None), Tensor) else set())


@lru_cache(maxsize=4)
def stream_rotation(size: int, seed: int, keep_mean: bool) -> Tensor:
    """The rotation of the residual stream, float64: the same wherever it is asked for."""
    return random_rotation(size, seed, keep_mean)


def turned(hidden: Tensor, rotation: Tensor) -> Tensor:
    """`hidden R` in the dtype of `hidden`."""
    return (hidden.double() @ rotation).to(hidden.dtype)


def turn(parameter: Tensor, axis: int, matrix: Tensor) -> None:
    """Multiply `parameter` by `matrix` from the right along `axis`, in place; computed in float64."""
    moved = parameter.movedim(axis, -1)
    moved.copy_(moved.double() @ matrix)


def subtracts_mean(norm: nn.Module) -> bool:
    """Whether the norm's output ignores a constant added to all channels: a LayerNorm's does."""
    size = len(norm.get_parameter("weight"))
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(norm.get_parameter("weight"))
    return relative_difference(norm(x + 3), norm(x)) < TOLERANCE


def _adds_one(norm: nn.Module) -> bool:
    """Whether a zero weight still lets the input through."""
    weight = norm.get_parameter("weight")
    x = torch.ones(2, len(weight)).to(weight)
    x[1, 0] = -1
    swaps = {n: torch.zeros_like(p) for n, p in norm.named_parameters(recurse=False)}
    return bool(torch.func.functional_call(norm, swaps, (x,)).abs().max() > 0)


def _take_gain(norm: nn.Module, adds_one: bool, rotation: Tensor) -> Tensor:
    """The norm's gain `[size]` float64; the norm is left without one, its bias fitted to the rotation."""
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    gain = weight.double() + float(adds_one)
    weight.fill_(0.0 if adds_one else 1.0)
    if isinstance(bias, Tensor):
        bias.copy_(torch.where(bias == 0, 0.0, bias.double() / gain) @ rotation)
    return gain


def _turn_written(module: nn.Module, read: set[str], rotation: Tensor) -> None:
    """Rotate what a reader that is no linear (stacked experts) writes to the stream with: its other parameters."""
    for name, parameter in module.named_parameters(recurse=False):
        axes = [
            axis for axis in range(max(0, parameter.ndim - 2), parameter.ndim) if parameter.shape[axis] == len(rotation)
        ]
        if name not in read and axes:
            turn(parameter, axes[0], rotation)


def _on_stream(feed: ChannelLink, hidden: Tensor) -> bool:
    return feed.kind != "linear" and feed.size == hidden.shape[-1]


class _run:  # noqa: N801  a run and what was seen in it
    """The model run on `ids`: the stream at the first block, what norms outside gave, what the head read, the logits."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        blocks, head = find_blocks(model)[1], model.get_output_embeddings()
        seen: list[Tensor] = []
        self.given: dict[str, Tensor] = {}

        def arrive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"]).clone())

        def give(name: str) -> Any:
            def hook(module: nn.Module, args: object, output: Tensor) -> None:
                self.given[name] = output

            return hook

        handles = [m.register_forward_hook(give(n)) for n, m in outside(model, blocks) if is_norm(m)]
        handles.append(blocks[0].register_forward_pre_hook(arrive, with_kwargs=True))
        if head is not None:
            handles.append(head.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
        self.logits: Tensor = model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        self.stream, self.read = seen[0], seen[-1]


METHOD = Method(Rotate, apply, scheme=Scheme(), apply_outside=apply_outside)

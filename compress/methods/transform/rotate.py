"""Rotations (QuaRot, offline half): rotate the residual stream by a random Hadamard matrix, so that outliers are spread.

    h' = h R       embeddings E R,   linears that write to the stream R^T W and b R,
                   linears that read it W diag(g) R,   norms without gain
    v' = v R_h     per head: value rows R_h^T W_v, output columns W_o R_h

Only weights change, so that every runtime loads the result. A norm's gain g moves into the linears that read it; a LayerNorm
keeps its bias as (b / g) R, and its R maps the vector of ones to itself, so that subtracting the mean commutes with it. Every
block and the model around the blocks are checked to compute the same (identity I6). A model that cannot be rotated without
operations at run time, such as one with norms after the linears that write to the stream, is refused.
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
from ...block import Block
from .hadamard import random_rotation
from .rescale import TOLERANCE, apply_or_revert, parameter_of, relative_difference

HINT = "leave the rotate pass out: this architecture would need operations at run time"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Rotate:
    """Options of the rotation.

    seed   of the random signs
    heads  also rotate every head's values
    """

    seed: int = 0
    heads: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"trial"})
    true_sequential: ClassVar[bool] = False


@torch.no_grad()
def apply(config: Rotate, block: Block) -> None:
    """Rotate a block: afterwards its input and output hidden states are rotated.

    Raises `CompressError` if the rotated block does not compute the same.
    """
    assert block.context is not None
    call, hidden = block.context.trial
    links = find_channel_links(block.module, call, hidden)
    if config.heads:
        for link in links:
            if link.kind == "linear":
                rotate_heads(block.module, link, block.context.head_size, config.seed, call, hidden)
    norms = [block.module.get_submodule(link.producer) for link in links if _reads_residual_stream(link, hidden)]
    rotation = stream_rotation(hidden.shape[-1], config.seed, any(map(subtracts_mean, norms))).to(hidden.device)
    expected = apply_rotation(call.replay(block.module, hidden), rotation)
    rotate_stream(block.module, [link for link in links if _reads_residual_stream(link, hidden)], rotation)
    moved = relative_difference(call.replay(block.module, apply_rotation(hidden, rotation)), expected)
    if not moved <= TOLERANCE:
        raise CompressError(f"{block.name} does not compute the same when rotated ({moved:.1e} of its output)", HINT)


def rotate_stream(block: nn.Module, links: list[ChannelLink], rotation: Tensor) -> None:
    """Rotate the parameters that read and write the residual stream; `links` are those of the norms on it.

    `rotation` is float64 `[width, width]`.
    """
    consumers: dict[str, set[str]] = {}
    for link in links:
        gain = _remove_gain(block.get_submodule(link.producer), link.kind == "offset-norm", rotation)
        for consumer in link.consumers:
            rotate_parameter(parameter_of(block, consumer), consumer.axis, gain.unsqueeze(1) * rotation)
            consumers.setdefault(consumer.module, set()).add(consumer.parameter)
    for name, linear in find_linears(block).items():
        if name not in consumers and weight_of(linear).shape[0] == len(rotation):
            rotate_parameter(linear.get_parameter("weight"), 1 if isinstance(linear, Conv1D) else 0, rotation)
            if linear.bias is not None:
                rotate_parameter(linear.get_parameter("bias"), 0, rotation)
    for name, read in consumers.items():
        if not isinstance(module := block.get_submodule(name), nn.Linear | Conv1D):
            _rotate_other_parameters(module, read, rotation)


def rotate_heads(block: nn.Module, link: ChannelLink, head_size: int, seed: int, call: Call, hidden: Tensor) -> None:
    """Rotate the value rows and output columns of every head by the same matrix, if `link` is from values to output.

    Links that are not, or that the rotation would break, are left unchanged.
    """
    if bool((link.channels < 0).any()) or len(link.channels) % head_size:
        return
    rotation = random_rotation(head_size, seed + 1).to(hidden.device)
    values = block.get_submodule(link.producer)
    heads = link.channels.view(-1, head_size).to(hidden.device)

    def change() -> None:
        for rows in heads.unique(dim=0):  # value heads shared by several query heads are rotated once
            weight_of(values)[rows] = (rotation.T @ weight_of(values)[rows].double()).to(hidden.dtype)
            if values.bias is not None:
                bias = values.get_parameter("bias")
                bias[rows] = (bias[rows].double() @ rotation).to(bias.dtype)
        for consumer in link.consumers:
            every_head = torch.block_diag(*[rotation] * len(heads))
            rotate_parameter(parameter_of(block, consumer), consumer.axis, every_head)

    parameters = [*values.parameters(recurse=False), *(parameter_of(block, consumer) for consumer in link.consumers)]
    apply_or_revert(change, parameters, block, call, hidden)


@torch.no_grad()
def apply_outside(config: Rotate, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, set[str]]:
    """Rotate embeddings, final norm and head of `model`, whose blocks must be replaced by the identity.

    `ids` int64 `[rows, length]` are used to check the result. A tied head must be untied before. Returns the rotation of the
    residual stream, float64 `[width, width]`, and the names of the changed parameters. Raises `CompressError` if there is no
    norm directly before the head, or the model does not compute the same afterwards.
    """
    head = model.get_output_embeddings()
    outer = {n: m for n, m in outside(model, find_blocks(model)[1]) if m is not head}
    before = _RecordedRun(model, ids)
    norms = [n for n, m in outer.items() if is_norm(m) and torch.equal(before.norms.get(n, ids), before.head_input)]
    if head is None or len(norms) != 1:
        raise CompressError(f"{type(model).__name__} has no norm directly before its head", HINT)
    norm = outer[norms[0]]
    rotation = stream_rotation(before.stream.shape[-1], config.seed, subtracts_mean(norm)).to(ids.device)
    embeddings = {n: m for n, m in outer.items() if isinstance(m, nn.Embedding) and m.embedding_dim == len(rotation)}
    for module in embeddings.values():
        rotate_parameter(module.get_parameter("weight"), 1, rotation)
    gain = _remove_gain(norm, _has_unit_offset(norm), rotation)
    rotate_parameter(head.get_parameter("weight"), 1, gain.unsqueeze(1) * rotation)
    after = _RecordedRun(model, ids)
    moved = max(
        relative_difference(after.stream, apply_rotation(before.stream, rotation)),
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
    """The rotation of the residual stream, float64 `[size, size]`: the same for the same arguments."""
    return random_rotation(size, seed, keep_mean)


def apply_rotation(hidden: Tensor, rotation: Tensor) -> Tensor:
    """`hidden @ rotation` in the dtype of `hidden`, computed in float64."""
    return (hidden.double() @ rotation).to(hidden.dtype)


def rotate_parameter(parameter: Tensor, axis: int, matrix: Tensor) -> None:
    """Multiply `parameter` by `matrix` from the right along `axis`, in place, computed in float64."""
    moved = parameter.movedim(axis, -1)
    moved.copy_(moved.double() @ matrix)


def subtracts_mean(norm: nn.Module) -> bool:
    """Whether the norm subtracts the mean of its input (LayerNorm), found by adding a constant to all channels."""
    size = len(norm.get_parameter("weight"))
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(norm.get_parameter("weight"))
    return relative_difference(norm(x + 3), norm(x)) < TOLERANCE


def _has_unit_offset(norm: nn.Module) -> bool:
    """Whether the norm multiplies by `1 + weight`, found with a zero weight."""
    weight = norm.get_parameter("weight")
    x = torch.ones(2, len(weight)).to(weight)
    x[1, 0] = -1
    swaps = {n: torch.zeros_like(p) for n, p in norm.named_parameters(recurse=False)}
    return bool(torch.func.functional_call(norm, swaps, (x,)).abs().max() > 0)


def _remove_gain(norm: nn.Module, adds_one: bool, rotation: Tensor) -> Tensor:
    """Set the norm's gain to 1 and rotate its bias, in place; returns the former gain `[size]`, float64."""
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    gain = weight.double() + float(adds_one)
    weight.fill_(0.0 if adds_one else 1.0)
    if isinstance(bias, Tensor):
        bias.copy_(torch.where(bias == 0, 0.0, bias.double() / gain) @ rotation)
    return gain


def _rotate_other_parameters(module: nn.Module, read: set[str], rotation: Tensor) -> None:
    """Rotate the parameters of a module that is not a linear (stacked experts) with which it writes to the stream.

    These are the ones that do not `read` the stream.
    """
    for name, parameter in module.named_parameters(recurse=False):
        axes = [
            axis for axis in range(max(0, parameter.ndim - 2), parameter.ndim) if parameter.shape[axis] == len(rotation)
        ]
        if name not in read and axes:
            rotate_parameter(parameter, axes[0], rotation)


def _reads_residual_stream(link: ChannelLink, hidden: Tensor) -> bool:
    return link.kind != "linear" and link.size == hidden.shape[-1]


class _RecordedRun:
    """A run of the model on `ids`.

    stream      residual stream at the first block
    norms       outputs of the norms outside the blocks, by name
    head_input  input of the head
    logits      output of the model
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        blocks, head = find_blocks(model)[1], model.get_output_embeddings()
        inputs: list[Tensor] = []  # of the first block and of the head
        self.norms: dict[str, Tensor] = {}

        def record_block_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((args[0] if args else kwargs["hidden_states"]).clone())

        def record_output(name: str) -> Any:
            def hook(module: nn.Module, args: object, output: Tensor) -> None:
                self.norms[name] = output

            return hook

        handles = [m.register_forward_hook(record_output(n)) for n, m in outside(model, blocks) if is_norm(m)]
        handles.append(blocks[0].register_forward_pre_hook(record_block_input, with_kwargs=True))
        if head is not None:
            handles.append(head.register_forward_pre_hook(lambda module, args: inputs.append(args[0])))
        self.logits: Tensor = model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        self.stream, self.head_input = inputs[0], inputs[-1]

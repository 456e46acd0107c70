"""Width pruning: inner channels of the MLP and key-value heads are removed, the same number in every block, and the remaining
weights compensate them by least squares. The result is a plain dense model that every runtime loads.

Each block is verified before it is written: its output must equal that of the original block with these channels at zero.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...calibrate.channel_graph.probing import difference
from ...calibrate.data.token_rows import TokenRows
from ...calibrate.model import safetensors_io
from ...calibrate.model.architecture import find_blocks, find_linears, set_weight, weight_of
from ...calibrate.model.config import config_of
from ...calibrate.model.skeleton import Names, assign, build, release
from ...calibrate.model.source import CONFIG, Source
from ...calibrate.runner import Runner
from ...errors import CompressError, UsageError
from ..formats.source import open_source
from ..output.target import appearing, check_target
from ..report.progress import Event, Observer, silent
from ..solver.channel_pruning import channels_to_remove, refit_channels
from ..solver.damped_hessian import damp
from .drop_layers import write_model
from .slices import ChannelSlice, attention_slice, mlp_slice, sliced_tensors

DAMPING = 0.01
GROUP = 128  # channels: the usual number of weights that share a scale
SAME = 1e-4  # relative difference of two orders of the same float32 sums


@dataclass(frozen=True)
class Width:
    """The width of every block: `mlp` inner channels (below 1: that share of them, in whole groups as weights are quantized
    in), `kv_heads` key-value heads with their queries; None: unchanged.

    `refit` False only removes the channels, for comparison.
    """

    mlp: float | None = None
    kv_heads: int | None = None
    refit: bool = True

    @property
    def requested(self) -> bool:
        """Whether any width changes."""
        return self.mlp is not None or self.kv_heads is not None

    def channels(self, now: int) -> int:
        """How many of `now` inner channels stay. Raises `UsageError` if that is not possible."""
        assert self.mlp is not None
        return kept_count("--mlp-width", self.mlp, now, GROUP)


def prune_width(
    model: str | Path,
    out: Path,
    width: Width,
    rows: TokenRows,
    device: str = "cpu",
    overwrite: bool = False,
    observer: Observer = silent,
) -> None:
    """Write `model` with pruned width into the directory `out`; channels and refit follow from the calibration `rows`.

    Raises `UsageError` if the model has no such channels or its config cannot express the widths, `CompressError` if a pruned
    block does not compute what it should.
    """
    source = open_source(model)
    skeleton = build(source)
    config = config_of_width(source, width)
    check_target(out, overwrite, source.path)
    with appearing(out) as folder:
        runner = Runner(skeleton, source, rows, folder / "scratch", device)
        runner.capture()
        pruned, names = pruned_skeleton(source, config, folder), Names(skeleton, source)
        tensors: dict[str, Tensor] = {}
        for index in range(len(runner.blocks)):
            runner.load(index)
            replaced = _prune_block(runner, index, pruned, width)
            for local, tensor in replaced.items():
                stored = names.find(f"{runner.block_name(index)}.{local}")
                assert stored is not None
                tensors[stored] = tensor.cpu().to(source.tensors[stored].spec.torch_dtype)
            runner.forward(index)
            runner.unload(index)
            observer(Event("block", index, len(runner.blocks)))
        specs = {name: t.spec for name, t in source.tensors.items()} | {
            name: safetensors_io.TensorSpec.of(t) for name, t in tensors.items()
        }
        write_model(folder, source, config, specs, lambda name: tensors[name] if name in tensors else source.read(name))


def config_of_width(source: Source, width: Width) -> dict[str, Any]:
    """The content of config.json of the pruned model. Raises `UsageError` for widths that are not possible."""
    parsed = config_of(source)
    text = parsed.get_text_config()
    if text is not parsed and width.requested:
        raise UsageError(
            f"{source.path} holds a language model inside another model", "only --drop and --layers are supported"
        )
    changes: dict[str, Any] = {}
    if width.mlp is not None:
        key, now = _mlp_width(text)
        changes[key] = width.channels(now)
    if width.kv_heads is not None:
        heads = text.num_attention_heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        kept = _checked_count("--kv-heads", width.kv_heads, groups)
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        changes |= {"num_attention_heads": heads // groups * kept, "num_key_value_heads": kept, "head_dim": head}
    return {**source.config, **changes}


def _mlp_width(text: PreTrainedConfig) -> tuple[str, int]:
    """The name of the MLP's width in the config, and its value."""
    for key in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        if hasattr(text, key):
            return key, getattr(text, key) or 4 * text.hidden_size
    raise UsageError(f"{type(text).__name__} has no entry for the width of the MLP", "leave out --mlp-width")


def kept_count(flag: str, asked: float, now: int, group: int) -> int:
    """How many of `now` channels stay: `asked`, or if that is below 1 that share of them, as a multiple of `gcd(now, group)`.

    Raises `UsageError`, which names the `flag`, if that is not possible.
    """
    group = math.gcd(now, group)
    return _checked_count(flag, max(1, round(asked * now / group)) * group if 0 < asked < 1 else asked, now)


def _checked_count(flag: str, wanted: float, now: int) -> int:
    if not 0 < wanted <= now or wanted % 1:
        raise UsageError(f"{flag} must be a whole number between 1 and {now}, or a share below 1; got {wanted:g}")
    return int(wanted)


def pruned_skeleton(source: Source, config: Mapping[str, Any], folder: Path) -> PreTrainedModel:
    """The pruned model without weights, built from the config that it will have in `folder`."""
    safetensors_io.write_text(folder / CONFIG, json.dumps(config))
    return build(Source(folder, source.name, dict(config), source.tensors))


def _prune_block(runner: Runner, index: int, pruned: PreTrainedModel, width: Width) -> dict[str, Tensor]:
    """Set removed channels of the loaded block to zero and refit it; returns the smaller tensors, verified."""
    block = runner.blocks[index]
    shared_inputs = runner.groups(index, set(find_linears(block)))
    slices: list[tuple[ChannelSlice, int]] = []
    if width.kv_heads is not None:
        slices.append((attention_slice(block, shared_inputs, runner.model.config), width.kv_heads))
    if width.mlp is not None:
        now = _mlp_width(runner.model.config)[1]
        slices.append((mlp_slice(block, shared_inputs, now), width.channels(now)))
    replaced: dict[str, Tensor] = {}
    for part, kept in slices:
        hessian = damp(runner.collect(index, {part.consumer}).hessians[part.consumer].matrix(), DAMPING)
        weight = weight_of(block.get_submodule(part.consumer)).detach()
        removed = channels_to_remove(weight, hessian, part.size(block), part.groups - kept)
        columns = removed.repeat_interleave(part.size(block))
        fitted = refit_channels(weight, hessian, columns) if width.refit else weight.masked_fill(columns, 0)
        set_weight(block.get_submodule(part.consumer), fitted)
        replaced |= sliced_tensors(block, part, removed)
    _verify(runner, index, pruned, replaced)
    return replaced


@torch.no_grad()
def _verify(runner: Runner, index: int, pruned: PreTrainedModel, replaced: Mapping[str, Tensor]) -> None:
    """Raise `CompressError` if the output of the smaller block differs from that of the larger one with zeros."""
    large, pruned_block = runner.blocks[index], find_blocks(pruned)[1][index]
    for name, placeholder in pruned_block.state_dict(keep_vars=True).items():
        tensor = replaced.get(name, large.state_dict(keep_vars=True)[name].detach())
        if tensor.shape != placeholder.shape:
            raise UsageError(
                f"{name} would have shape {tuple(tensor.shape)}, but the config requires {tuple(placeholder.shape)}",
                "the width of this architecture cannot be pruned",
            )
        assign(pruned_block, name, tensor)
    call, hidden, _ = next(runner.samples(index))
    off = difference(call.replay(pruned_block, hidden), call.replay(large, hidden))
    release(pruned_block)
    if not off <= SAME:
        raise CompressError(
            f"the output of block {index} changes by {off:.1e} if its width is pruned", "report this architecture"
        )

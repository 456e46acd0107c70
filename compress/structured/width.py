"""Narrower blocks: inner channels of the MLP and key-value heads go, the same number in every block, and the rest makes up
for them by least squares. The result is a plain dense model that every runtime loads.

Each block is proven as it is written: the smaller block must give what the original one gives with these channels at zero.
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
from ...calibrate.model.skeleton import Names, assign, build, config_of, release
from ...calibrate.model.source import CONFIG, Source
from ...calibrate.runner import Runner
from ...errors import CompressError, UsageError
from ..formats.source import open_source
from ..report.progress import Event, Observer, silent
from ..solver.channel_pruning import channels_to_remove, refit_channels
from ..solver.damped_hessian import damp
from ..workspace import appearing, check_target
from .drop_layers import write_model
from .slices import Cut, attention_cut, cut_tensors, mlp_cut

DAMPING = 0.01
GROUP = 128  # channels: the usual group of weights that share a scale
SAME = 1e-4  # relative difference of two orders of the same float32 sums


@dataclass(frozen=True)
class Width:
    """What every block is narrowed to: `mlp` inner channels (below 1: that share of them, in whole groups as weights are
    quantized in), `kv_heads` key-value heads with their queries; None: as it is.

    `refit` False only takes the channels out, for comparison.
    """

    mlp: float | None = None
    kv_heads: int | None = None
    refit: bool = True

    @property
    def asked(self) -> bool:
        """Whether anything becomes narrower."""
        return self.mlp is not None or self.kv_heads is not None

    def channels(self, now: int) -> int:
        """How many of `now` inner channels stay. Raises `UsageError` where that cannot be."""
        assert self.mlp is not None
        return share("--mlp-width", self.mlp, now, GROUP)


def prune_width(
    model: str | Path,
    out: Path,
    width: Width,
    rows: TokenRows,
    device: str = "cpu",
    overwrite: bool = False,
    observer: Observer = silent,
) -> None:
    """Write a narrower `model` into the directory `out`, channels chosen and weights refitted on the calibration `rows`.

    Raises `UsageError` where the model has no such channels or its config cannot say so, `CompressError` where the narrower
    block does not compute what it should.
    """
    source = open_source(model)
    skeleton = build(source)
    config = narrowed(source, width)
    check_target(out, overwrite)
    with appearing(out) as folder:
        runner = Runner(skeleton, source, rows, folder / "scratch", device)
        runner.capture()
        small, names = skeleton_of(source, config, folder), Names(skeleton, source)
        tensors: dict[str, Tensor] = {}
        for index in range(len(runner.blocks)):
            runner.load(index)
            replaced = _narrow_block(runner, index, small, width)
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


def narrowed(source: Source, width: Width) -> dict[str, Any]:
    """The content of config.json of the narrower model. Raises `UsageError` for widths that cannot be."""
    parsed = config_of(source)
    text = parsed.get_text_config()
    if text is not parsed and width.asked:
        raise UsageError(f"{source.path} holds a language model inside another one", "only its layers can be reduced")
    changes: dict[str, Any] = {}
    if width.mlp is not None:
        key, now = _mlp_width(text)
        changes[key] = width.channels(now)
    if width.kv_heads is not None:
        heads = text.num_attention_heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        kept = _smaller("--kv-heads", width.kv_heads, groups)
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        changes |= {"num_attention_heads": heads // groups * kept, "num_key_value_heads": kept, "head_dim": head}
    return {**source.config, **changes}


def _mlp_width(text: PreTrainedConfig) -> tuple[str, int]:
    """What the config calls the width of the MLP, and how wide it is."""
    for key in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        if hasattr(text, key):
            return key, getattr(text, key) or 4 * text.hidden_size
    raise UsageError(f"{type(text).__name__} names no width of the MLP", "leave out --mlp-width")


def share(flag: str, asked: float, now: int, group: int) -> int:
    """How many of `now` channels stay: as many as `asked`, or below 1 that share of them, in whole groups of `group` where
    `now` has such. Raises `UsageError`, which names the `flag`, where that cannot be."""
    group = math.gcd(now, group)
    return _smaller(flag, max(1, round(asked * now / group)) * group if 0 < asked < 1 else asked, now)


def _smaller(flag: str, wanted: float, now: int) -> int:
    if not 0 < wanted <= now or wanted % 1:
        raise UsageError(f"{flag} {wanted:g} is not possible", f"give a number between 1 and {now}")
    return int(wanted)


def skeleton_of(source: Source, config: Mapping[str, Any], folder: Path) -> PreTrainedModel:
    """The narrower model without weights, by the config that it will have in `folder`."""
    (folder / CONFIG).write_text(json.dumps(config))
    return build(Source(folder, source.name, dict(config), source.tensors))


def _narrow_block(runner: Runner, index: int, small: PreTrainedModel, width: Width) -> dict[str, Tensor]:
    """Narrow the loaded block in place (channels that go become zero), and give the smaller tensors, proven."""
    block = runner.blocks[index]
    sharing = runner.groups(index, set(find_linears(block)))
    wanted: list[tuple[Cut, int]] = []
    if width.kv_heads is not None:
        wanted.append((attention_cut(block, sharing, runner.model.config), width.kv_heads))
    if width.mlp is not None:
        now = _mlp_width(runner.model.config)[1]
        wanted.append((mlp_cut(block, sharing, now), width.channels(now)))
    replaced: dict[str, Tensor] = {}
    for cut, kept in wanted:
        hessian = damp(runner.collect(index, {cut.consumer}).hessians[cut.consumer].matrix(), DAMPING)
        weight = weight_of(block.get_submodule(cut.consumer)).detach()
        gone = channels_to_remove(weight, hessian, cut.size(block), cut.groups - kept)
        columns = gone.repeat_interleave(cut.size(block))
        fitted = refit_channels(weight, hessian, columns) if width.refit else weight.masked_fill(columns, 0)
        set_weight(block.get_submodule(cut.consumer), fitted)
        replaced |= cut_tensors(block, cut, gone)
    _prove(runner, index, small, replaced)
    return replaced


@torch.no_grad()
def _prove(runner: Runner, index: int, small: PreTrainedModel, replaced: Mapping[str, Tensor]) -> None:
    """Raise `CompressError` where the smaller block does not give what the larger one with zeros gives."""
    large, narrow_block = runner.blocks[index], find_blocks(small)[1][index]
    for name, placeholder in narrow_block.state_dict(keep_vars=True).items():
        tensor = replaced.get(name, large.state_dict(keep_vars=True)[name].detach())
        if tensor.shape != placeholder.shape:
            raise UsageError(
                f"{name} would have shape {tuple(tensor.shape)}, the config says {tuple(placeholder.shape)}",
                "this architecture cannot be narrowed so",
            )
        assign(narrow_block, name, tensor)
    call, hidden, _ = next(runner.samples(index))
    off = difference(call.replay(narrow_block, hidden), call.replay(large, hidden))
    release(narrow_block)
    if not off <= SAME:
        raise CompressError(
            f"block {index} computes something else when it is narrower (by {off:.1e})", "report this architecture"
        )

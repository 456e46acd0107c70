"""Pruning of the hidden size: the same channels are removed from embeddings, norms, head and every layer that reads or writes
the residual stream, and the readers compensate them by least squares. The result is a dense model that every runtime loads.

The channels are chosen for the whole model at once, by what their absence costs all readers together, each relative to the
energy of its output. The root mean square of a norm is over the channels that stay: the average change is folded into its gain.
Nothing is rotated: tied embeddings stay tied. The axes that are sliced follow from the smaller config, by the lengths that
change; every block and the modules around the blocks are verified to compute what the larger ones compute with these
channels at zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...calibrate.channel_graph.links import find_channel_links
from ...calibrate.channel_graph.probe import Probe
from ...calibrate.channel_graph.probing import difference, is_norm
from ...calibrate.data.token_rows import TokenRows
from ...calibrate.model.architecture import find_blocks, find_linears, set_weight, weight_of
from ...calibrate.model.config import config_of
from ...calibrate.model.safetensors_io import TensorSpec
from ...calibrate.model.skeleton import assign, build, outside, release
from ...calibrate.model.source import Source
from ...calibrate.runner import Runner
from ...calibrate.statistics.hessian import Hessian
from ...errors import CompressError, UsageError
from ..formats.source import open_source
from ..methods.transform.rotate import subtracts_mean
from ..output.target import appearing, check_target
from ..report.progress import Event, Observer, silent
from ..solver.channel_pruning import refit_channels, refit_gain, shared_channels_to_remove
from ..solver.damped_hessian import damp
from .drop_layers import write_model
from .width import DAMPING, SAME, kept_count, pruned_skeleton

GROUP = 64  # channels: the hidden size stays a multiple of it if it is one
OUTLIER = 1000.0  # factor of the stream in a verification: norms cancel it, and their epsilon becomes negligible


@dataclass(frozen=True)
class StreamReader:
    """A norm on the stream and the linears that read it, by full names; `hessian` float64 is that of the norm's output.

    `offset` norms multiply by 1 + weight. The weight of a `tied` head is the embedding and cannot change.
    """

    norm: str
    linears: tuple[str, ...]
    hessian: Tensor
    offset: bool = False
    tied: bool = False


def prune_hidden_size(
    model: str | Path,
    out: Path,
    size: float,
    rows: TokenRows,
    device: str = "cpu",
    *,
    refit: bool = True,
    overwrite: bool = False,
    observer: Observer = silent,
) -> None:
    """Write `model` with a hidden size of `size` channels (below 1: that share) into the directory `out`.

    `refit` False only removes the channels, for comparison. Raises `UsageError` if the architecture or its config does not
    support fewer channels, `CompressError` if the smaller model does not compute what it should.
    """
    source = open_source(model)
    config = config_of_hidden_size(source, size)
    check_target(out, overwrite, source.path)
    with appearing(out) as folder:
        skeleton = build(source)
        runner = Runner(skeleton, source, rows, folder / "scratch", device)
        runner.capture()
        probe = Probe(skeleton, source, folder / "scratch/probe", device)
        pruning = _HiddenSizePruning(runner, pruned_skeleton(source, config, folder), probe, refit)
        readers = pruning.readers(observer)
        tensors = pruning.sliced_tensors(readers, pruning.channels_to_remove(readers), observer)
        specs = {name: t.spec for name, t in source.tensors.items()}
        specs |= {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        write_model(folder, source, config, specs, lambda name: tensors[name] if name in tensors else source.read(name))


def config_of_hidden_size(source: Source, size: float) -> dict[str, Any]:
    """The content of config.json of the model with `size` channels. Raises `UsageError` for sizes that are not possible."""
    parsed = config_of(source)
    text = parsed.get_text_config()
    if text is not parsed:
        raise UsageError(
            f"{source.path} holds a language model inside another model", "only --drop and --layers are supported"
        )
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key = text.attribute_map.get("hidden_size", "hidden_size")
    return {**source.config, key: kept_count("--hidden-size", size, text.hidden_size, GROUP), "head_dim": head}


class _HiddenSizePruning:
    """The pruning of one model, with the larger and the smaller one side by side."""

    def __init__(self, runner: Runner, pruned: PreTrainedModel, probe: Probe, refit: bool) -> None:
        self.runner, self.pruned, self.probe, self.refit = runner, pruned, probe, refit
        self.model, self.names = runner.model, runner.names
        self.width: int = self.model.config.get_text_config().hidden_size
        self.size: int = pruned.config.get_text_config().hidden_size
        self._offsets: dict[str, float] = {}  # of the norms whose gain is set, by full name
        for name, buffer in pruned.named_buffers():
            assign(pruned, name, buffer.to(runner.device))

    def readers(self, observer: Observer) -> list[StreamReader]:
        """Every norm on the stream with the Hessian of its output; the last is the norm before the head."""
        found = []
        for index in range(len(self.runner.blocks)):
            self.runner.load(index)
            found += self._readers_inside(index)
            self.runner.forward(index)
            self.runner.unload(index)
            observer(Event("block", index, len(self.runner.blocks)))
        return [*found, self._before_the_head()]

    @torch.no_grad()
    def channels_to_remove(self, readers: Sequence[StreamReader]) -> Tensor:
        """The channels to remove: bool `[width]`."""
        free, fixed = [], []
        for reader in readers:
            gram = sum(
                (w.double().T @ w.double() for w in map(self._stored, reader.linears)),
                torch.zeros(self.width, self.width, dtype=torch.float64),
            )
            if reader.tied:
                fixed.append(gram * reader.hessian)
            else:
                free.append((gram, damp(reader.hessian, DAMPING)))
        return shared_channels_to_remove(free, fixed, self.width - self.size)

    @torch.no_grad()
    def sliced_tensors(self, readers: Sequence[StreamReader], removed: Tensor, observer: Observer) -> dict[str, Tensor]:
        """The tensors that change, by their names in the checkpoint, verified, in their stored dtypes."""
        tensors: dict[str, Tensor] = {}
        for index in range(len(self.runner.blocks)):
            block, prefix = self.runner.load(index), f"{self.runner.block_name(index)}."
            for reader in readers:
                if reader.norm.startswith(prefix):
                    self._compensate(reader, removed)
            tensors |= self._sliced(block, prefix, removed)
            self._verify_block(index, removed)
            self.runner.unload(index)
            observer(Event("block", index, len(self.runner.blocks)))
        with self.runner.without_blocks() as model:
            self._compensate(readers[-1], removed)
            for name, module in outside(model, self.runner.blocks):
                tensors |= self._sliced(module, f"{name}.", removed)
            self._verify_outside()
        stored = {self.names.find(name): tensor for name, tensor in tensors.items() if not self.names.ties(name)}
        return {
            name: tensor.cpu().to(self.runner.source.tensors[name].spec.torch_dtype).contiguous()
            for name, tensor in stored.items()
            if name is not None
        }

    def _readers_inside(self, index: int) -> Iterator[StreamReader]:
        block, name = self.runner.blocks[index], self.runner.block_name(index)
        call, hidden = self.probe.experiment(index)
        links = {
            link.producer: link
            for link in find_channel_links(block, call, hidden)
            if link.kind != "linear" and link.size == self.width
        }
        for norm, module in block.named_modules():
            if not self._is_on_stream(module):
                continue
            linears = [c.module for c in links[norm].consumers] if norm in links else []
            linears = [n for n in linears if n in find_linears(block)]
            if not linears or subtracts_mean(module):
                raise UsageError(
                    f"{name}.{norm} is not a root mean square norm in front of linear layers",
                    "this architecture keeps its hidden size: leave out --hidden-size",
                )
            hessian = self.runner.collect(index, {linears[0]}).hessians[linears[0]].matrix().double().cpu()
            full = tuple(f"{name}.{linear}" for linear in linears)
            yield StreamReader(f"{name}.{norm}", full, hessian, links[norm].kind == "offset-norm")

    @torch.no_grad()
    def _before_the_head(self) -> StreamReader:
        head = self.model.get_output_embeddings()
        name = next(n for n, m in self.model.named_modules() if m is head)
        norms = [n for n, m in outside(self.model, self.runner.blocks) if self._is_on_stream(m)]
        hessian = Hessian(self.width)
        with self.runner.without_blocks() as model:
            if len(norms) != 1 or subtracts_mean(model.get_submodule(norms[0])):
                raise UsageError("there is no root mean square norm before the head", "leave out --hidden-size")
            for _, hidden, mask in self.runner.samples(len(self.runner.blocks) - 1):
                given = model.get_submodule(norms[0])(hidden)
                hessian.update(given.flatten(0, 1) if mask is None else given[mask.bool()], len(given))
        return StreamReader(norms[0], (name,), hessian.matrix().double().cpu(), tied=self.names.ties(f"{name}.weight"))

    def _is_on_stream(self, module: nn.Module) -> bool:
        return is_norm(module) and len(module.get_parameter("weight")) == self.width

    def _stored(self, linear: str) -> Tensor:
        """The weight `[out, in]` of a linear, read from the checkpoint."""
        stored = self.names.find(f"{linear}.weight")
        assert stored is not None
        weight = self.runner.source.read(stored, check=True).float()
        return weight if isinstance(self.model.get_submodule(linear), nn.Linear) else weight.T

    def _compensate(self, reader: StreamReader, removed: Tensor) -> None:
        """Refit the loaded linears after a norm, and set the gain that it needs in the larger model without `removed`."""
        norm = self.model.get_submodule(reader.norm)
        weight = norm.get_parameter("weight")
        gain = weight.double().cpu() + float(reader.offset)
        energy = torch.where(gain == 0, 0.0, reader.hessian.diagonal() / gain.square())
        # The share of the kept channels in the mean square; the larger norm still divides by the number of all channels.
        gain = gain * (energy[~removed].sum() / energy.sum()).sqrt()
        solver = damp(reader.hessian, DAMPING)
        for name in reader.linears if self.refit and not reader.tied else ():
            linear = self.model.get_submodule(name)
            set_weight(linear, refit_channels(weight_of(linear).detach().cpu(), solver, removed).to(weight.device))
        if reader.tied and self.refit:
            head = weight_of(self.model.get_submodule(reader.linears[0])).detach().cpu()
            gain[~removed] *= refit_gain(reader.hessian, head, removed)
        weight.copy_(gain.masked_fill(removed, 0) - float(reader.offset))
        self._offsets[reader.norm] = float(reader.offset)

    def _sliced(self, module: nn.Module, prefix: str, removed: Tensor) -> dict[str, Tensor]:
        """The smaller parameters of `module`, by full name; in the module itself the removed channels become zero."""
        tensors = {}
        placeholders = dict(self.pruned.named_parameters(remove_duplicate=False))
        for name, parameter in module.named_parameters():
            wanted, kept = placeholders[f"{prefix}{name}"].shape, parameter.detach()
            axes = [axis for axis, length in enumerate(parameter.shape) if length != wanted[axis]]
            for axis in axes:
                if parameter.shape[axis] != self.width or wanted[axis] != self.size:
                    raise UsageError(
                        f"{prefix}{name} would have shape {tuple(wanted)} instead of {tuple(parameter.shape)}",
                        "the hidden size of this architecture cannot be pruned",
                    )
                kept = kept.index_select(axis, (~removed).nonzero().flatten().to(kept.device))
            norm = f"{prefix}{name}".rpartition(".")[0]
            if norm in self._offsets:  # its gain is set, and it divides by the mean over fewer channels
                offset = self._offsets[norm]
                kept = (kept + offset) * (self.width / self.size) ** 0.5 - offset
            else:
                for axis in axes:
                    parameter.data.index_fill_(axis, removed.nonzero().flatten().to(parameter.device), 0)
            if axes:
                tensors[f"{prefix}{name}"] = kept
            assign(self.pruned, f"{prefix}{name}", kept)
        return tensors

    def _verify_block(self, index: int, removed: Tensor) -> None:
        call, hidden = self.probe.experiment(index)
        hidden = OUTLIER * hidden.masked_fill(removed.to(hidden.device), 0)
        pruned = find_blocks(self.pruned)[1][index]
        expected = call.replay(self.runner.blocks[index], hidden)
        self._compare(f"block {index}", call.replay(pruned, hidden[..., ~removed]), expected[..., ~removed])
        release(pruned)

    def _verify_outside(self) -> None:
        forward = self.runner.blocks[0].forward
        for block in find_blocks(self.pruned)[1]:
            block.forward = forward
        ids, given = torch.arange(min(32, self.model.config.get_text_config().vocab_size)).unsqueeze(0), []
        for model in (self.pruned, self.model):
            table = model.get_input_embeddings()
            assign(table, "weight", table.get_parameter("weight").detach() * OUTLIER)
            given.append(model(input_ids=ids.to(self.runner.device), use_cache=False).logits)
        self._compare("the head", *given)

    def _compare(self, what: str, found: Tensor, expected: Tensor) -> None:
        off = difference(found, expected)
        if not off <= SAME:
            raise CompressError(
                f"the output of {what} changes by {off:.1e} with fewer channels", "report this architecture"
            )

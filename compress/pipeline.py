"""The pipeline: for each block, gather what the passes need, apply the passes, pack and write, run it for the next block.

The output grows in a hidden sibling of the target, a file per block, and is renamed when complete. A run that was killed
goes on where it stopped: finished blocks are read back and only run forward.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibrate.channel_graph.probe import Probe
from ..calibrate.data.token_rows import TokenRows, calibration_rows
from ..calibrate.kv_cache import calibrate
from ..calibrate.model.architecture import find_linears, set_weight, weight_of
from ..calibrate.model.skeleton import Names, build, context_length, device_of
from ..calibrate.model.source import Source
from ..calibrate.runner import Runner
from ..calibrate.statistics.collect import Statistics
from ..kernels.activations import quantized_inputs
from ..kernels.tensor import Compressed, joined
from ..recipes.schema import PassSpec, Recipe
from ..recipes.scheme import QuantArgs
from .block import Block, BlockContext, Linear
from .formats import pack_quantized
from .formats.kinds.grid import round_to_grid
from .formats.source import open_source
from .formats.tokenizer import load_tokenizer
from .input_grids import with_input_grids
from .memory import peak_bytes, return_freed_pages
from .plan import Plan, make_plan
from .report.progress import Event, Observer, silent
from .report.verdict import Verdict, judge
from .runtime_support import check as check_targets
from .workspace import Workspace, check_target

TABLE_ROWS = 8192  # of an embedding that are widened at a time: all of it would be the largest tensor
Tell = Callable[..., None]  # (phase, layer=None, **figures)


@dataclass(frozen=True)
class RunReport:
    """What a run did. `layers` holds one dictionary of figures per quantized layer; sizes are of the weight files."""

    out: Path
    plan: Plan
    layers: list[dict[str, float | int | str]]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    seconds: float
    peak_bytes: int

    @property
    def verdict(self) -> Verdict:
        """Whether the result can be trusted."""
        return judge(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "out": str(self.out),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "verdict": self.verdict.word,
            "notes": self.plan.notes,
            "layers": self.layers,
        }


def plan(model: str | Path, recipe: Recipe, targets: Sequence[str] = ()) -> Plan:
    """What `run` would do, from the config and the file headers alone.

    Raises `UsageError` where one of the runtimes `targets` could not serve the result.
    """
    source = open_source(model)
    planned = make_plan(source, build(source), recipe)
    check_targets((*planned.layers, *planned.tables), targets, planned.inputs, planned.kv)
    return planned


@return_freed_pages()
def run(
    model: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    targets: Sequence[str] = (),
    observer: Observer = silent,
) -> RunReport:
    """Compress the Hugging Face directory (or hub id) `model` by `recipe` into the directory `out`.

    Raises `UsageError` before anything is written, `CompressError` later; `out` appears only when it is complete.
    """
    started = time.monotonic()
    device_of(device)
    source = open_source(model)
    skeleton = build(source)
    planned = make_plan(source, skeleton, recipe)
    check_target(out, overwrite)
    check_targets((*planned.layers, *planned.tables), targets, planned.inputs, planned.kv)
    observer(Event("plan", blocks=planned.blocks))
    rows = _rows(source, context_length(skeleton.config), recipe, observer) if _calibrated(recipe, planned) else None
    with Workspace.open(out, source, planned, recipe, rows, overwrite) as workspace:
        _walk(skeleton, source, recipe, planned, rows, workspace, device, observer)
        _round_tables(skeleton, source, planned, workspace)
        observer(Event("assemble", planned.blocks, planned.blocks))
        layers = workspace.finish()
    observer(Event("done", planned.blocks, planned.blocks))
    return RunReport(
        out=out,
        plan=planned,
        layers=layers,
        bytes_before=planned.bytes_before,
        bytes_after=planned.bytes_after,
        bits_per_weight=planned.bits_per_weight,
        seconds=time.monotonic() - started,
        peak_bytes=peak_bytes(),
    )


def _needs(recipe: Recipe) -> frozenset[str]:
    return frozenset().union(*(p.config.needs for p in recipe.passes))


def _calibrated(recipe: Recipe, planned: Plan) -> bool:
    """Whether calibration rows are read: by a pass, or for static ranges of inputs or of the cache."""
    static_inputs = planned.inputs is not None and not planned.inputs.dynamic
    return bool(_needs(recipe) - {"trial"}) or static_inputs or (planned.kv is not None and planned.kv.static)


def _rows(source: Source, limit: int | None, recipe: Recipe, observer: Observer) -> TokenRows:
    """The calibration rows, no longer than the model's context `limit`."""
    asked = recipe.calibration
    length = asked.seq_len if limit is None else min(asked.seq_len, limit)
    if length < asked.seq_len:
        observer(Event("warning", message=f"rows of {length} tokens instead of {asked.seq_len}: the model's context"))
    rows = calibration_rows(asked.data, load_tokenizer(source.path), asked.samples, length, recipe.seed)
    for note in rows.notes:
        observer(Event("warning", message=note))
    return rows


def _walk(
    skeleton: PreTrainedModel,
    source: Source,
    recipe: Recipe,
    planned: Plan,
    rows: TokenRows | None,
    workspace: Workspace,
    device: str,
    observer: Observer,
) -> None:
    needs = _needs(recipe)
    trains = "block_io" in needs
    runner = Runner(skeleton, source, rows, workspace.scratch, device, trains or "drift" in needs, small_batches=trains)
    if rows is not None:
        observer(Event("capture", blocks=planned.blocks))
        runner.capture()
    probe = None
    if _needs(recipe) & {"samples", "trial"}:
        probe = Probe(skeleton, source, workspace.scratch / "probe", device)
        _transform_outside(recipe, probe, planned, runner, workspace)
    for index in range(planned.blocks):

        def tell(phase: str, layer: str | None = None, index: int = index, **figures: float | int | str) -> None:
            observer(Event(phase, index, planned.blocks, layer, figures=figures))

        if workspace.has(index) and rows is None:
            continue
        tell("load")
        module = runner.load(index)
        if workspace.has(index):
            compressed = workspace.compressed(index)
            _restore(skeleton, compressed, workspace.dense(index))
        else:
            compressed = _compress(index, module, recipe, planned, runner, workspace, probe, tell)
        if rows is not None and index + 1 < planned.blocks:
            tell("forward")
            with quantized_inputs(
                module, {_local(name, runner.block_name(index)): t for name, t in compressed.items()}
            ):
                runner.forward(index)
        del compressed  # not held while the next block is at work
        runner.unload(index)
        tell("block")


def _compress(
    index: int,
    module: nn.Module,
    recipe: Recipe,
    planned: Plan,
    runner: Runner,
    workspace: Workspace,
    probe: Probe | None,
    tell: Tell,
) -> dict[str, Compressed]:
    """Apply the passes to the loaded block and write what becomes of it."""
    name = runner.block_name(index)
    block = Block(name, module, _linears(name, module, planned), seed=recipe.seed)
    block.context = None if probe is None else _surroundings(index, runner, probe, planned)
    for entry in recipe.passes:
        if "original" in _needs(recipe) and entry.method_entry.compresses and entry.config.scheme is not None:
            _keep_originals(block)
        _apply(entry, block, runner, index, tell)
        if not entry.method_entry.compresses:
            _settle(block, planned)
            runner.update_reference(index)
    compressed = _with_inputs(block, runner, index)
    if planned.kv is not None and planned.kv.static:
        with quantized_inputs(module, {_local(n, name): tensor for n, tensor in compressed.items()}):
            workspace.write_cache_ranges(index, calibrate(module, runner.samples(index), planned.kv))
    tell("write")
    workspace.write(index, block.linears, _dense(block, planned) if probe is not None else {})
    return compressed


def _linears(block: str, module: nn.Module, planned: Plan) -> list[Linear]:
    args = planned.quantized
    found = {f"{block}.{name}": linear for name, linear in find_linears(module).items()}
    return [
        Linear(name, weight_of(linear).detach(), args[name], inputs=planned.inputs)
        for name, linear in found.items()
        if name in args
    ]


def _keep_originals(block: Block) -> None:
    """Let the linears' weights be copies, which stay as they are when the module's own are replaced."""
    for linear in block.linears:
        linear.weight = linear.weight.clone()


def _local(name: str, block: str) -> str:
    return name.removeprefix(f"{block}.")


def _surroundings(index: int, runner: Runner, probe: Probe, planned: Plan) -> BlockContext:
    prefix = f"{runner.block_name(index)}."
    config = runner.model.config.get_text_config()
    return BlockContext(
        samples=lambda: runner.samples(index),
        trial=probe.experiment(index),
        dtypes={n.removeprefix(prefix): s.torch_dtype for n, s in planned.tensors.items() if n.startswith(prefix)},
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )


def _transform_outside(recipe: Recipe, probe: Probe, planned: Plan, runner: Runner, workspace: Workspace) -> None:
    """Let a transform of the whole model rewrite what lies outside the blocks, and turn the recorded stream."""
    for entry in recipe.passes:
        if entry.method_entry.apply_outside is not None:
            with probe.outside() as (model, ids):
                matrix, names = entry.method_entry.apply_outside(entry.config, model, ids)
                dtypes = {name: planned.tensors[name].torch_dtype for name in names}
                workspace.write_outside({name: model.get_parameter(name).to(dtypes[name]) for name in names})
            runner.rotate_hidden_states(matrix)


def _round_tables(skeleton: PreTrainedModel, source: Source, planned: Plan, workspace: Workspace) -> None:
    """Round the embedding and the head to nearest, as planned."""
    names, packed = Names(skeleton, source), {}
    for table in planned.tables:
        stored = names.find(f"{table.name}.weight")
        assert stored is not None and isinstance(table.args, QuantArgs)
        parts = source.read(stored, check=True).split(TABLE_ROWS)
        packed |= pack_quantized.pack(table.name, joined([round_to_grid(part.float(), table.args) for part in parts]))
    if packed:
        workspace.write_outside(packed)


def _settle(block: Block, planned: Plan) -> None:
    """Round what a transform left in the tensors that stay dense to their stored dtype: what is evaluated is what is served."""
    with torch.no_grad():
        for name, tensor in _dense(block, planned).items():
            parameter = block.module.get_parameter(_local(name, block.name))
            parameter.copy_(tensor)


def _dense(block: Block, planned: Plan) -> dict[str, Tensor]:
    """The parameters of the block that stay dense, in their stored dtype, by their names in the output."""
    named = {f"{block.name}.{name}": parameter for name, parameter in block.module.named_parameters()}
    return {n: p.detach().to(planned.tensors[n].torch_dtype) for n, p in named.items() if n in planned.copied}


def _restore(skeleton: PreTrainedModel, compressed: dict[str, Compressed], dense: dict[str, Tensor]) -> None:
    """Put a finished block's stored weights back into the loaded module."""
    for name, tensor in compressed.items():
        set_weight(skeleton.get_submodule(name), tensor.dequantize())
    parameters = dict(skeleton.named_parameters())
    for name, tensor in dense.items():
        if name in parameters:
            parameters[name].copy_(tensor)


def _with_inputs(block: Block, runner: Runner, index: int) -> dict[str, Compressed]:
    """The results of the block's linears by full name, told how their inputs are quantized."""
    local = block.local()
    for name, tensor in with_input_grids(block, runner.samples(index)).items():
        local[name].result = tensor
    return {linear.name: linear.result for linear in block.linears if linear.result is not None}


def _apply(entry: PassSpec, block: Block, runner: Runner, index: int, tell: Tell) -> None:
    """Carry out one pass on a loaded block, in one stage or, if it asks for it, linears with a common input at a time."""
    local = block.local()
    if "block_io" in entry.config.needs:
        tell("train")
        block = replace(block, io=runner.io(index))
    if "hessian" not in entry.config.needs:
        return _solve(entry, block, local, Statistics(), tell)
    tell("collect")
    hold_out = "held" in entry.config.needs
    if not entry.config.true_sequential:
        return _solve(entry, block, local, runner.collect(index, set(local), hold_out=hold_out), tell)
    for names in runner.groups(index, set(local)):
        statistics = runner.collect(index, set(names), hold_out=hold_out)
        _solve(entry, block, {name: local[name] for name in names}, statistics, tell)
    return None


def _solve(entry: PassSpec, block: Block, local: dict[str, Linear], statistics: Statistics, tell: Tell) -> None:
    """Apply the pass to the linears `local` (by name inside the block) and put what they become into the module."""
    for name, linear in local.items():
        linear.hessian, linear.drift = statistics.hessians.get(name), statistics.drifts.get(name)
        linear.held = statistics.held.get(name)
        if linear.hessian is not None:
            linear.figures["tokens"] = linear.hessian.tokens
    entry.method_entry.apply(entry.config, replace(block, linears=list(local.values())))
    for name, linear in local.items():
        linear.hessian = linear.drift = linear.held = None
        if linear.result is not None:
            set_weight(block.module.get_submodule(name), linear.result.dequantize())
            tell("solve", linear.name, **linear.figures)

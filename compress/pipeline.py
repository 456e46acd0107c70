"""The pipeline: for each block, collect what the passes need, apply the passes, pack and write, run it for the next block.

The output grows in the workspace, one file per block. If a run was interrupted, its finished blocks are read back and only run
forward.
"""

from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibrate.channel_graph.probe import Probe
from ..calibrate.fidelity import FidelityMeter
from ..calibrate.kv_cache import calibrate
from ..calibrate.model.architecture import find_linears, set_weight, weight_of
from ..calibrate.model.skeleton import Names
from ..calibrate.runner import Runner
from ..calibrate.statistics.collect import Statistics
from ..kernels.activations import quantized_inputs
from ..kernels.tensor import Compressed, joined
from ..recipes.methods import Needs
from ..recipes.schema import PassSpec, Recipe
from ..recipes.scheme import QuantArgs
from .block import Block, BlockContext, Linear
from .formats import pack_quantized
from .formats.kinds.grid import round_to_grid
from .input_grids import with_input_grids
from .plan import Plan
from .report.progress import Event, Observer, silent
from .workspace import Workspace

TABLE_ROWS = 8192  # of an embedding that are widened at a time: the whole of it would be the largest tensor in memory


def compress_blocks(
    skeleton: PreTrainedModel,
    workspace: Workspace,
    meter: FidelityMeter | None = None,
    device: str = "cpu",
    observer: Observer = silent,
) -> None:
    """Apply the workspace's recipe to the blocks of `skeleton`, the model of its source without weights, and write them.

    A `meter` is shown every block before and after.
    """
    walk = Walk.of(skeleton, workspace, meter, device, observer)
    walk.capture()
    for index in range(walk.plan.blocks):
        if not workspace.has(index) or walk.calibrated or meter is not None:
            walk.visit(index)


def round_tables(skeleton: PreTrainedModel, workspace: Workspace) -> None:
    """Round the embedding and the head to nearest, as planned, and write them."""
    source = workspace.source
    names, packed = Names(skeleton, source), {}
    for table in workspace.plan.tables:
        stored = names.find(f"{table.name}.weight")
        assert stored is not None and isinstance(table.args, QuantArgs)
        parts = source.read(stored, check=True).split(TABLE_ROWS)
        packed |= pack_quantized.pack(table.name, joined([round_to_grid(part.float(), table.args) for part in parts]))
    if packed:
        workspace.write_outside(packed)


def needs_calibration(recipe: Recipe, plan: Plan) -> bool:
    """Whether calibration rows are read: by a pass, or for static ranges of inputs or of the cache."""
    static_inputs = plan.inputs is not None and not plan.inputs.dynamic
    return _needs(recipe).text or static_inputs or (plan.kv is not None and plan.kv.static)


def _needs(recipe: Recipe) -> Needs:
    return reduce(or_, (entry.config.needs for entry in recipe.passes))


@dataclass(frozen=True)
class Walk:
    """One walk through the blocks: the model, where results go, and what runs blocks and tries changes on them."""

    skeleton: PreTrainedModel
    workspace: Workspace
    runner: Runner
    probe: Probe | None
    meter: FidelityMeter | None
    observer: Observer

    @classmethod
    def of(
        cls,
        skeleton: PreTrainedModel,
        workspace: Workspace,
        meter: FidelityMeter | None,
        device: str,
        observer: Observer,
    ) -> "Walk":
        """A walk with the runner, and the probe if a pass needs one, on `device`."""
        needs, source, scratch = _needs(workspace.recipe), workspace.source, workspace.scratch
        trains = needs.block_io
        references = trains or needs.drift
        runner = Runner(skeleton, source, workspace.rows, scratch, device, references, small_batches=trains)
        probe = Probe(skeleton, source, scratch / "probe", device) if needs.samples or needs.trial else None
        return cls(skeleton, workspace, runner, probe, meter, observer)

    @property
    def plan(self) -> Plan:
        """What becomes of every tensor."""
        return self.workspace.plan

    @property
    def recipe(self) -> Recipe:
        """The passes."""
        return self.workspace.recipe

    @property
    def calibrated(self) -> bool:
        """Whether calibration rows go through the blocks."""
        return self.workspace.rows is not None

    def emit(self, index: int, phase: str, layer: str | None = None, **figures: float | int | str) -> None:
        """Report an event of block `index`."""
        self.observer(Event(phase, index, self.plan.blocks, layer, figures=figures))

    def capture(self) -> None:
        """Record the inputs of the first block, and let transforms of the whole model rewrite what is outside the blocks."""
        if self.calibrated:
            self.observer(Event("capture", blocks=self.plan.blocks))
            self.runner.capture()
        if self.probe is not None:
            self._transform_outside(self.probe)
        if self.meter is not None:
            self.meter.capture(_rewritten_outside(self.skeleton, self.workspace))

    def visit(self, index: int) -> None:
        """Compress block `index`, or restore it if it is finished, and run it for the next one."""
        self.emit(index, "load")
        module = self.runner.load(index)
        if self.meter is not None:
            self.meter.original(index)
        if self.workspace.has(index):
            compressed = self.workspace.compressed(index)
            _restore(self.skeleton, compressed, self.workspace.dense(index))
        else:
            compressed = self._compress(index, module)
        with quantized_inputs(module, self._by_local_name(index, compressed)):
            if self.calibrated and index + 1 < self.plan.blocks:
                self.emit(index, "forward")
                self.runner.forward(index)
            if self.meter is not None:
                self.meter.compressed(index)
        del compressed  # not held while the next block is at work
        self.runner.unload(index)
        self.emit(index, "block")

    def _compress(self, index: int, module: nn.Module) -> dict[str, Compressed]:
        """Apply the passes to the loaded block and write the result."""
        name, plan = self.runner.block_name(index), self.plan
        block = Block(name, module, _linears(name, module, plan), seed=self.recipe.seed)
        block.context = None if self.probe is None else self._context(index, self.probe)
        for entry in self.recipe.passes:
            starts_compressing = entry.method_entry.compresses and not entry.method_entry.refines
            if _needs(self.recipe).original and starts_compressing:
                _keep_originals(block)
            self._apply(entry, block, index)
            if not entry.method_entry.compresses:
                _round_to_stored_dtype(block, plan)
                self.runner.update_reference(index)
        compressed = self._with_inputs(block, index)
        if plan.kv is not None and plan.kv.static:
            with quantized_inputs(module, self._by_local_name(index, compressed)):
                self.workspace.write_cache_ranges(index, calibrate(module, self.runner.samples(index), plan.kv))
        self.emit(index, "write")
        self.workspace.write(index, block.linears, _dense(block, plan) if self.probe is not None else {})
        return compressed

    def _apply(self, entry: PassSpec, block: Block, index: int) -> None:
        """Run one pass on a loaded block, in one stage or, if the pass is truly sequential, group by group of linears."""
        local, needs = block.local(), entry.config.needs
        if needs.block_io:
            self.emit(index, "train")
            block = replace(block, io=self.runner.io(index))
        if not needs.hessian:
            self._solve(entry, block, local, Statistics(), index)
            return
        self.emit(index, "collect")
        groups = self.runner.groups(index, set(local)) if entry.config.true_sequential else [list(local)]
        for names in groups:
            statistics = self.runner.collect(index, set(names), hold_out=needs.held)
            self._solve(entry, block, {name: local[name] for name in names}, statistics, index)

    def _solve(
        self, entry: PassSpec, block: Block, local: dict[str, Linear], statistics: Statistics, index: int
    ) -> None:
        """Apply the pass to the linears `local` (by name inside the block) and put the results into the module."""
        for name, linear in local.items():
            linear.hessian, linear.drift = statistics.hessians.get(name), statistics.drifts.get(name)
            linear.held_out = statistics.held_out.get(name)
            if linear.hessian is not None:
                linear.figures["tokens"] = linear.hessian.tokens
        entry.method_entry.apply(entry.config, replace(block, linears=list(local.values())))
        for name, linear in local.items():
            linear.hessian = linear.drift = linear.held_out = None
            if linear.result is not None:
                set_weight(block.module.get_submodule(name), linear.result.dequantize())
                self.emit(index, "solve", linear.name, **linear.figures)

    def _context(self, index: int, probe: Probe) -> BlockContext:
        """What a pass may ask about the block's surroundings."""
        prefix, runner = f"{self.runner.block_name(index)}.", self.runner
        specs = {name.removeprefix(prefix): s for name, s in self.plan.tensors.items() if name.startswith(prefix)}
        config = runner.model.config.get_text_config()
        return BlockContext(
            samples=lambda: runner.samples(index),
            trial=probe.experiment(index),
            dtypes={name: spec.torch_dtype for name, spec in specs.items()},
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )

    def _transform_outside(self, probe: Probe) -> None:
        """Let a transform of the whole model rewrite what is outside the blocks, and rotate the recorded hidden states."""
        for entry in self.recipe.passes:
            if entry.method_entry.apply_outside is not None:
                with probe.outside() as (model, ids):
                    matrix, names = entry.method_entry.apply_outside(entry.config, model, ids)
                    dtypes = {name: self.plan.tensors[name].torch_dtype for name in names}
                    rewritten = {name: model.get_parameter(name).to(dtypes[name]) for name in names}
                    self.workspace.write_outside(rewritten)
                self.runner.rotate_hidden_states(matrix)

    def _with_inputs(self, block: Block, index: int) -> dict[str, Compressed]:
        """The results of the block's linears by full name, with the grids of their inputs."""
        local = block.local()
        for name, tensor in with_input_grids(block, self.runner.samples(index)).items():
            local[name].result = tensor
        return {linear.name: linear.result for linear in block.linears if linear.result is not None}

    def _by_local_name(self, index: int, compressed: dict[str, Compressed]) -> dict[str, Compressed]:
        block = self.runner.block_name(index)
        return {_local(name, block): tensor for name, tensor in compressed.items()}


def _rewritten_outside(skeleton: PreTrainedModel, workspace: Workspace) -> dict[str, Tensor]:
    """The parameters outside the blocks that the result has other values for, by their names in the model."""
    stored, tables = workspace.outside(), {f"{table.name}.weight": table for table in workspace.plan.tables}
    found = {
        name: tensor
        for name, tensor in stored.items()
        if name in dict(skeleton.named_parameters(remove_duplicate=False))
    }
    for name, table in tables.items():
        assert isinstance(table.args, QuantArgs)
        found[name] = pack_quantized.unpack(table.name, stored, table.args).dequantize()
    names = dict(skeleton.named_parameters(remove_duplicate=False))
    tied = {name: found[other] for name, p in names.items() for other in tables if p is names[other]}
    return found | tied


def _linears(block: str, module: nn.Module, planned: Plan) -> list[Linear]:
    args = planned.quantized
    found = {f"{block}.{name}": linear for name, linear in find_linears(module).items()}
    return [
        Linear(name, weight_of(linear).detach(), args[name], inputs=planned.inputs)
        for name, linear in found.items()
        if name in args
    ]


def _keep_originals(block: Block) -> None:
    """Copy the linears' weights, which then stay as they are when the module's own are replaced."""
    for linear in block.linears:
        linear.weight = linear.weight.clone()


def _local(name: str, block: str) -> str:
    return name.removeprefix(f"{block}.")


def _round_to_stored_dtype(block: Block, planned: Plan) -> None:
    """Round what a transform left in the dense tensors to their stored dtype, so that what is evaluated is what is served."""
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

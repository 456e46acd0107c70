"""The plan: what a recipe will do to a model, tensor by tensor, from the config and the file headers alone.

Nothing is computed or loaded, and the plan is exact: the sizes that it predicts are the sizes on disk.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..calibrate.model import safetensors_io
from ..calibrate.model.architecture import find_blocks, find_linears, weight_of
from ..calibrate.model.moe import checkpoint_module_names, renamed, routers
from ..calibrate.model.safetensors_io import TensorSpec
from ..calibrate.model.skeleton import Names, check_tensors, outside
from ..calibrate.model.source import Source
from ..errors import UsageError
from ..kernels.cache.cache import check_cache
from ..recipes.schema import Recipe
from ..recipes.scheme import SUPER_BLOCK, CacheScheme, PruneArgs, QuantArgs, Scheme, WeightArgs, kinds
from ..recipes.scheme.prune_args import Scope, Storage
from .formats import pack_quantized
from .formats.int_quantized import IntQuantized
from .formats.kinds import pruned as sparse
from .formats.kv_cache import attentions, scale_specs
from .formats.registry import format_of

OUTSIDE = -1  # the block number of layers outside the blocks


@dataclass(frozen=True)
class LayerPlan:
    """What one linear layer becomes. `args` is None if it stays dense; `note` is what had to be adapted to its shape."""

    name: str
    block: int
    kind: str
    shape: tuple[int, int]
    args: WeightArgs | None
    nbytes: int
    note: str | None = None

    def stored_as(self, storage: Storage) -> int:
        """Bytes of the pruned layer in another storage."""
        assert isinstance(self.args, PruneArgs)
        return sum(s.nbytes for s in sparse.spec(self.name, replace(self.args, storage=storage), *self.shape).values())


@dataclass(frozen=True)
class Plan:
    """What every linear layer becomes, and every tensor of the output.

    layers        the linear layers of the blocks, in their order
    heads         the linear layers outside the blocks that stay dense
    untouched     parameters of the blocks that no linear layer holds, such as the experts of a layer in one tensor
    copied        output name -> name of the source tensor that is copied unchanged
    tensors       output name -> spec, of all output tensors
    blocks        number of decoder blocks; `prefix` is the name of their list
    bytes_before  of the source's weight files; `bytes_after` of the output's
    inputs        how the inputs of the quantized layers are quantized
    untied        the head, if it was tied to the embedding and gets a weight of its own
    kv            how the key-value cache is packed
    attentions    the attention layers that store its scales, as compressed-tensors does; without any, the scales are in a
                  file of their own, if they are stored at all
    tables        the embedding and the head, if they are quantized
    called        modules that have another name in the weight files, as experts do
    routers       of mixtures of experts
    """

    layers: tuple[LayerPlan, ...]
    heads: tuple[str, ...]
    untouched: tuple[str, ...]
    copied: dict[str, str]
    tensors: dict[str, TensorSpec]
    blocks: int
    prefix: str
    bytes_before: int
    bytes_after: int
    inputs: QuantArgs | None = None
    untied: str | None = None
    kv: CacheScheme | None = None
    attentions: tuple[str, ...] = ()
    tables: tuple[LayerPlan, ...] = ()
    called: dict[str, str] = field(default_factory=dict)
    routers: tuple[str, ...] = ()

    @property
    def quantized(self) -> dict[str, WeightArgs]:
        """The layers that will be quantized or pruned, with their resolved arguments."""
        return {layer.name: layer.args for layer in self.layers if layer.args is not None}

    @property
    def dense(self) -> list[str]:
        """The linear layers of the blocks that stay as they are."""
        return [layer.name for layer in self.layers if layer.args is None]

    @property
    def renamed(self) -> dict[str, str]:
        """The tensors that have another name in the files."""
        return {name: renamed(name, self.called) for name in self.tensors if name.rpartition(".")[0] in self.called}

    @property
    def notes(self) -> list[str]:
        """Every deviation from what was requested, with the layers that it concerns."""
        grouped: dict[str, list[str]] = {}
        for layer in (*self.layers, *self.tables):
            if layer.note:
                grouped.setdefault(layer.note, []).append(layer.name)
        if self.untouched:
            grouped["kept dense, weights in more than two dimensions"] = list(self.untouched)
        return [f"{note}: {_summary(names)}" for note, names in grouped.items()] + self._size_of_zeros()

    def _size_of_zeros(self) -> list[str]:
        """A note if the zeros of pruned layers save nothing on disk, with the storage in which they would."""
        pruned = [layer for layer in self.layers if isinstance(layer.args, PruneArgs)]
        if not pruned or any(layer.args.storage != "dense" for layer in pruned if isinstance(layer.args, PruneArgs)):
            return []
        masked = sum(layer.stored_as("bitmask") for layer in pruned)
        dense = sum(layer.nbytes for layer in pruned)
        hint = f"--format bitmask makes these layers {1 - masked / dense:.0%} smaller" if masked < dense else ""
        return [f"zeros in a dense file save nothing{'; ' if hint else ''}{hint}"]

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per weight of the quantized layers, scales and zeros included."""
        layers = [layer for layer in self.layers if layer.args is not None]
        return 8 * sum(layer.nbytes for layer in layers) / sum(math.prod(layer.shape) for layer in layers)


def make_plan(source: Source, model: PreTrainedModel, recipe: Recipe) -> Plan:
    """Decide what every tensor of `source` becomes; `model` is its skeleton.

    Raises `UsageError` if the source is quantized already, if the recipe leaves every layer dense or has a budget that is not
    allocated yet, or if the format cannot hold what the recipe asks for, and `CompressError` as `check_tensors` does.
    """
    if "quantization_config" in source.config:
        raise UsageError(f"{source.path} is quantized already", "start from the original model")
    if recipe.allocate is not None:
        raise UsageError("this recipe has a bit budget that has not been allocated yet", "run it with lmpress.run")
    names = Names(model, source)
    check_tensors(source, model, names)
    prefix, blocks = find_blocks(model)
    inputs, kv = _inputs(recipe), _kv(recipe, model)
    layers = tuple(_plan_layers(prefix, blocks, recipe, source, names))
    _check_kinds(layers)
    tables = tuple(_plan_tables(model, names, source, recipe, layers))
    scaled = _with_scales(kv, model, layers, inputs)
    untied = _untied(model, names) if any(entry.method_entry.apply_outside for entry in recipe.passes) else None
    compressed = [layer for layer in (*layers, *tables) if layer.args is not None]
    copied = _copied(source, model, names, {names.find(f"{layer.name}.weight") for layer in compressed})
    tensors = _tensors(compressed, inputs) | {name: source.tensors[stored].spec for name, stored in copied.items()}
    if kv is not None:
        tensors |= scale_specs(scaled, kv)
    if untied is not None:
        tensors[f"{untied}.weight"] = _stored_spec(source, names, untied)
    called = _names_in_files(model, tensors, layers, inputs)
    return Plan(
        layers=layers,
        heads=_heads(model, blocks, tables),
        untouched=tuple(f"{prefix}.{name}" for name, p in blocks.named_parameters() if p.ndim > 2),
        copied=copied,
        tensors=tensors,
        blocks=len(blocks),
        prefix=prefix,
        bytes_before=source.nbytes,
        bytes_after=safetensors_io.nbytes({renamed(name, called): spec for name, spec in tensors.items()}),
        inputs=inputs,
        untied=untied,
        kv=kv,
        attentions=scaled,
        tables=tables,
        called=called,
        routers=tuple(name for name, module in model.named_modules() if module in routers(blocks)),
    )


def _check_kinds(layers: Sequence[LayerPlan]) -> None:
    """Raise `UsageError` if every layer stays dense, or if two layers cannot be stored in one checkpoint."""
    if not any(layer.args for layer in layers):
        raise UsageError("the recipe leaves every layer dense", "use keep patterns that match fewer layers")
    kinds = {layer.args.kind: layer.name for layer in layers if isinstance(layer.args, QuantArgs)}
    if len(kinds) > 1:
        (first, one), (second, other) = list(kinds.items())[:2]
        raise UsageError(
            f"layers {one} ({first}) and {other} ({second}) cannot be stored in one checkpoint",
            "give the layers weights of one kind, or keep some dense",
        )


def _tensors(compressed: Sequence[LayerPlan], inputs: QuantArgs | None) -> dict[str, TensorSpec]:
    """The specs of the tensors that the compressed layers are stored in."""
    tensors: dict[str, TensorSpec] = {}
    for layer in compressed:
        assert layer.args is not None
        tensors |= format_of(layer.args, inputs).spec(layer.name, layer.args, *layer.shape)
    return tensors


def _stored_spec(source: Source, names: Names, module: str) -> TensorSpec:
    stored = names.find(f"{module}.weight")
    assert stored is not None
    return source.tensors[stored].spec


def _names_in_files(
    model: PreTrainedModel, tensors: Iterable[str], layers: Sequence[LayerPlan], inputs: QuantArgs | None
) -> dict[str, str]:
    """The modules that have another name in the weight files than in the model, if other runtimes read these files."""
    pruned = [layer.args for layer in layers if isinstance(layer.args, PruneArgs)]
    plain = bool(pruned) and all(args.storage == "dense" for args in pruned)
    modules = {name.rpartition(".")[0] for name in tensors}
    return checkpoint_module_names(model, modules) if plain or _read_elsewhere(layers, inputs) else {}


def _heads(model: PreTrainedModel, blocks: nn.ModuleList, tables: Sequence[LayerPlan]) -> tuple[str, ...]:
    """The linear layers outside the blocks that are not stored as tables."""
    linears = (name for name, module in outside(model, blocks) if isinstance(module, nn.Linear))
    return tuple(name for name in linears if name not in {table.name for table in tables})


def _inputs(recipe: Recipe) -> QuantArgs | None:
    return recipe.scheme.inputs if isinstance(recipe.scheme, Scheme) else None


def _kv(recipe: Recipe, model: PreTrainedModel) -> CacheScheme | None:
    scheme = recipe.scheme.kv if isinstance(recipe.scheme, Scheme) else None
    if scheme is not None:
        check_cache(model.config)
    return scheme


def _with_scales(
    kv: CacheScheme | None, model: PreTrainedModel, layers: Sequence[LayerPlan], inputs: QuantArgs | None
) -> tuple[str, ...]:
    """The attention layers that store the scales of the cache: all of them if other runtimes can read the checkpoint."""
    return tuple(attentions(model)) if kv is not None and kv.is_shared and _read_elsewhere(layers, inputs) else ()


def _read_elsewhere(layers: Sequence[LayerPlan], inputs: QuantArgs | None) -> bool:
    """Whether all layers are stored in formats of compressed-tensors."""
    used = {format_of(layer.args, inputs) for layer in layers if layer.args is not None}
    return all(each is pack_quantized or isinstance(each, IntQuantized) for each in used)


def _untied(model: PreTrainedModel, names: Names) -> str | None:
    """The head, if it shares its weight with the embedding."""
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    return head if head is not None and names.ties(f"{head}.weight") else None


def _plan_layers(
    prefix: str, blocks: nn.ModuleList, recipe: Recipe, source: Source, names: Names
) -> Iterator[LayerPlan]:
    for index, block in enumerate(blocks):
        for local, module in find_linears(block).items():
            name = f"{prefix}.{index}.{local}"
            found = names.find(f"{name}.weight")
            stored = torch.float32 if found is None else source.tensors[found].spec.torch_dtype
            yield _plan_layer(name, index, module, stored, recipe)


def _plan_layer(name: str, block: int, module: nn.Module, stored: torch.dtype, recipe: Recipe) -> LayerPlan:
    shape, kind = _shape(module), type(module).__name__
    asked = recipe.weights(name)
    if asked is None:
        return LayerPlan(name, block, kind, shape, None, 0, "kept dense as asked")
    if isinstance(asked, PruneArgs):
        args, note = _pruned(asked, recipe.solver.method_entry.scope, module, stored)
    else:
        args, note = _quantized(name, asked, shape, stored, recipe)
    storing = format_of(args, _inputs(recipe))
    reason = storing.supports(args)
    if reason:
        raise UsageError(f"{name} cannot be stored: {reason}")
    nbytes = sum(spec.nbytes for spec in storing.spec(name, args, *shape).values())
    return LayerPlan(name, block, kind, shape, args, nbytes, note)


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = weight_of(module).shape
    return rows, columns


def _pruned(asked: PruneArgs, scope: Scope, module: nn.Module, stored: torch.dtype) -> tuple[PruneArgs, str | None]:
    """The arguments of a layer that is pruned, by a method of this `scope`, and what had to be adapted."""
    _, columns = _shape(module)
    args = asked.for_layer(columns, stored, scope, transposed=isinstance(module, Conv1D))
    if args.pattern != asked.pattern:
        return args, f"blocks of {asked.block} do not fit {columns} columns: single weights are pruned"
    return (
        args,
        None if args.storage == asked.storage else f"2:4 storage does not fit {columns} columns: a bitmask is used",
    )


def _quantized(
    name: str, asked: QuantArgs, shape: tuple[int, int], stored: torch.dtype, recipe: Recipe
) -> tuple[QuantArgs, str | None]:
    """The arguments of a layer that is quantized, with what every pass adds to them, and what had to be adapted."""
    args = _fitted(name, asked, shape[1])
    note = None if args == asked else _adapted(asked, args, shape[1])
    args = kinds.kind_of(args).for_layer(args, stored)
    for entry in recipe.passes:
        if entry.method_entry.adapt is not None:
            args = entry.method_entry.adapt(entry.config, args, shape)
    return args, note


def _fitted(name: str, args: QuantArgs, columns: int) -> QuantArgs:
    try:
        return args.for_width(columns)
    except UsageError as error:
        raise UsageError(f"{name} cannot be stored: {error.message}", f"use --keep '{name}'") from error


def _plan_tables(
    model: PreTrainedModel, names: Names, source: Source, recipe: Recipe, layers: Sequence[LayerPlan]
) -> Iterator[LayerPlan]:
    """The embedding, and the head if it has a weight of its own, quantized by `recipe.embedding`."""
    asked = recipe.embedding
    if asked is None:
        return
    if asked.strategy not in ("group", "channel") or pack_quantized.supports(asked):
        raise UsageError(
            "an embedding can only be quantized in groups or rows of integers", "use strategy group or channel"
        )
    if any(entry.method_entry.apply_outside for entry in recipe.passes):
        raise UsageError("a pass that transforms the whole model rewrites the embedding", "leave `embedding` out")
    if any(layer.args and format_of(layer.args, _inputs(recipe)) is not pack_quantized for layer in layers):
        raise UsageError(f"an embedding is only packed with {pack_quantized.NAME} layers", "leave `embedding` out")
    for name, module in model.named_modules():
        if module is model.get_input_embeddings() and type(module) is not nn.Embedding:
            raise UsageError(f"{name} is a {type(module).__name__}, not a plain table", "leave `embedding` out")
        if module is not model.get_input_embeddings() and module is not model.get_output_embeddings():
            continue
        stored = names.find(f"{name}.weight")
        if stored is None or names.ties(f"{name}.weight"):
            continue
        rows, columns = source.tensors[stored].spec.shape
        args = _fitted(name, asked, columns)
        nbytes = sum(spec.nbytes for spec in pack_quantized.spec(name, args, rows, columns).values())
        note = None if args == asked else _adapted(asked, args, columns)
        yield LayerPlan(name, OUTSIDE, type(module).__name__, (rows, columns), args, nbytes, note)


def _adapted(asked: QuantArgs, args: QuantArgs, columns: int) -> str:
    wanted = f"{asked.block}'s super-block of {SUPER_BLOCK}" if asked.block else f"group size {asked.group_size}"
    used = args.block or (f"group size {args.group_size}" if args.group_size else "one scale per row")
    return f"{wanted} does not divide {columns}: {used} is used"


def _copied(source: Source, model: PreTrainedModel, names: Names, replaced: set[str | None]) -> dict[str, str]:
    """Output name -> source tensor of all that is copied, by the model's name of the tensor if it has one."""
    known = {}
    for name in model.state_dict(keep_vars=True):
        stored = names.find(name)
        if stored is not None and stored not in replaced:
            known.setdefault(stored, name)
    return {known.get(stored, stored): stored for stored in source.tensors if stored not in replaced}


def _summary(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

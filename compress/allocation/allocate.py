"""Allocation of a budget: the bits, or the share of zeros, of each layer.

Every layer is rounded (or loses its smallest weights) alone, at every level, and the divergence of the model from itself is
measured; dynamic programming finds the least sum of divergences within the budget. The result is an ordinary recipe whose
`overrides` hold the level of each layer: its plan is exact, and running it again measures nothing. The cost is the whole model
in memory, and `layers * levels` forward passes over `tokens` tokens.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...calibrate.data.token_rows import TokenRows, calibration_rows
from ...calibrate.model.architecture import weight_of
from ...calibrate.model.safetensors_io import storage_errors
from ...calibrate.model.skeleton import context_length
from ...calibrate.model.source import Source
from ...calibrate.statistics.sensitivity import Sensitivity
from ...errors import UsageError
from ...kernels.tensor.grid import Grid
from ...recipes.schema import Allocation, Recipe
from ...recipes.scheme import PruneArgs, QuantArgs, WeightArgs
from ..formats.tokenizer import load_tokenizer
from ..load import load
from ..methods.prune.masks import smallest
from ..plan import LayerPlan, Plan, make_plan
from ..report.progress import Event, Observer, silent
from ..solver.allocate import Option, allocate

BITS = (2, 3, 4, 5, 6, 8)
STEPS = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2)  # of sparsity around the average
MOST = 0.95  # sparsity
Overrides = dict[str, dict[str, float]]


@contextmanager
def allocated(
    source: Source,
    skeleton: PreTrainedModel,
    out: Path,
    recipe: Recipe,
    device: str = "cpu",
    observer: Observer = silent,
) -> Iterator[Recipe]:
    """The recipe that a run of `recipe` on `source` into `out` uses: `recipe` itself if it has no budget to allocate.

    The measurements are kept in a hidden file next to `out` until the context ends without an error, so that an interrupted
    run continues without measuring again. `skeleton` is the model of `source` without weights.
    """
    if recipe.allocate is None:
        yield recipe
        return
    note = out.parent / f".{out.name}.allocation.json"
    rows = _rows(source, skeleton, recipe, recipe.allocate)
    request = {"recipe": recipe.model_dump(mode="json"), "source": source.fingerprint, "rows": rows.fingerprint}
    known = json.loads(note.read_text()) if note.exists() else {}
    if known.get("request") != request:
        overrides = choose_overrides(source, skeleton, recipe, rows, device, observer)
        known = {"request": request, "overrides": overrides}
        with storage_errors(note):
            note.parent.mkdir(parents=True, exist_ok=True)
            half = note.with_suffix(".partial")
            half.write_text(json.dumps(known))
            half.replace(note)
    decisions = {name: recipe.overrides.get(name, {}) | chosen for name, chosen in known["overrides"].items()}
    yield recipe.model_copy(update={"allocate": None, "overrides": recipe.overrides | decisions})
    note.unlink(missing_ok=True)


def most_bytes(planned: Plan, recipe: Recipe) -> int:
    """The largest size in bytes of the compressed layers after the allocation; `planned` is the plan of the uniform recipe."""
    assert recipe.allocate is not None
    layers = [layer for layer in planned.layers if layer.args is not None]
    if isinstance(recipe.scheme.weights, PruneArgs):
        return sum(layer.nbytes for layer in layers)
    return int(_budget(layers, recipe, recipe.allocate))


def uniform(recipe: Recipe) -> Recipe:
    """`recipe` without its budget: every layer gets the level of the scheme."""
    return recipe.model_copy(update={"allocate": None})


def choose_overrides(
    source: Source,
    skeleton: PreTrainedModel,
    recipe: Recipe,
    rows: TokenRows,
    device: str = "cpu",
    observer: Observer = silent,
) -> Overrides:
    """Measure every layer at every level and choose a level for each: overrides of the recipe by layer name.

    Raises `UsageError` if no choice fits the budget.
    """
    allocation = recipe.allocate
    assert allocation is not None
    offered = levels(recipe, allocation)
    plans = [_at_level(source, skeleton, recipe, level) for level in offered]
    budget = _budget(plans[0], recipe, allocation)
    if budget < sum(min(_cost(at) for at in variants) for variants in zip(*plans, strict=True)):
        average = _average(recipe, allocation)
        unit = "zeros" if isinstance(recipe.scheme.weights, PruneArgs) else "bits"
        raise UsageError(
            f"an average of {average:g} {unit} cannot be reached with levels {offered}",
            "ask for another average, or other levels",
        )
    database = _measure(source, plans, rows, device, observer)
    field = _field(recipe)
    return {
        name: {field: getattr(plans[i][n].args, field)}
        for n, (name, i) in enumerate(allocate(database, budget).items())
    }


def levels(recipe: Recipe, allocation: Allocation) -> list[float]:
    """The bits or sparsities that a layer may get. Raises `UsageError` if the recipe has no average to allocate."""
    if allocation.levels:
        return list(allocation.levels)
    if isinstance(recipe.scheme.weights, PruneArgs):
        around = _average(recipe, allocation)
        return sorted({round(min(max(around + step, 0.0), MOST), 6) for step in STEPS})
    return list(BITS)


def _average(recipe: Recipe, allocation: Allocation) -> float:
    weights = recipe.scheme.weights
    if isinstance(weights, PruneArgs):
        if weights.n_of_m is not None:
            raise UsageError(
                "the pattern fixes the sparsity of every layer, so it cannot be allocated",
                "give --sparsity instead of --pattern",
            )
        return weights.sparsity if allocation.average is None else allocation.average
    if allocation.average is None:
        raise UsageError("`allocate` needs an average number of bits per weight", "write `allocate: {average: 3.5}`")
    return allocation.average


def _budget(layers: Sequence[LayerPlan], recipe: Recipe, allocation: Allocation) -> float:
    """Bytes on disk, scales included; for pruning, the number of weights that stay."""
    average = _average(recipe, allocation)
    if isinstance(recipe.scheme.weights, PruneArgs):
        return sum(_cost(replace(layer, args=replace(layer.args, sparsity=average))) for layer in layers if layer.args)
    return sum(layer.shape[0] * layer.shape[1] for layer in layers) * average / 8


def _at_level(source: Source, skeleton: PreTrainedModel, recipe: Recipe, level: float) -> list[LayerPlan]:
    """The plans of the compressed layers, all of them at `level` except those that the recipe overrides."""
    changed = {"*": {_field(recipe): level}} | recipe.overrides
    planned = make_plan(source, skeleton, recipe.model_copy(update={"overrides": changed, "allocate": None}))
    return [layer for layer in planned.layers if layer.args is not None]


def _field(recipe: Recipe) -> str:
    return "sparsity" if isinstance(recipe.scheme.weights, PruneArgs) else "bits"


def _cost(layer: LayerPlan) -> float:
    if isinstance(layer.args, PruneArgs):
        return layer.shape[0] * layer.shape[1] - layer.args.zeros(*layer.shape)
    return layer.nbytes


def _measure(
    source: Source, plans: Sequence[Sequence[LayerPlan]], rows: TokenRows, device: str, observer: Observer
) -> dict[str, list[Option]]:
    model = load(source.path, device)
    names = [layer.name for layer in plans[0]]
    sensitivity = Sensitivity(model, rows.ids, rows.mask)
    energies = sensitivity.energies(dict.fromkeys(names))
    database: dict[str, list[Option]] = {}
    for index, variants in enumerate(zip(*plans, strict=True)):
        name = names[index]
        observer(Event("allocate", index, len(names), name))
        weight = weight_of(model.get_submodule(name)).detach().clone()
        energy = energies.get(name, torch.ones_like(weight[0]))  # an expert that no token reached
        database[name] = [
            Option(_cost(at), sensitivity.loss(name, _stand_in(weight, at.args, energy))) for at in variants
        ]
    return database


def _stand_in(weight: Tensor, args: WeightArgs | None, energy: Tensor) -> Tensor:
    """A quick substitute for the method's result for `weight` `[out, in]`: rounded, or without its smallest `|w| * ||x||`.

    `energy` `[in]` is the sum of squares of each input.
    """
    if isinstance(args, PruneArgs):
        return weight.masked_fill(smallest(weight.square() * energy, replace(args, scope="layer")), 0)
    assert isinstance(args, QuantArgs)
    grid = Grid.fit(weight, args, energy)
    return grid.dequantize(grid.quantize(weight))


def _rows(source: Source, skeleton: PreTrainedModel, recipe: Recipe, allocation: Allocation) -> TokenRows:
    """The first calibration rows, up to `tokens` tokens in total."""
    asked, limit = recipe.calibration, context_length(skeleton.config)
    length = min(asked.seq_len, allocation.tokens, *([] if limit is None else [limit]))
    count = min(asked.samples, max(1, allocation.tokens // length))
    return calibration_rows(asked.data, load_tokenizer(source.path), count, length, recipe.seed)

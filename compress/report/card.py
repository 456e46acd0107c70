"""The model card of a compressed checkpoint: its content, the recipe that made it, and how it is loaded."""

from ...calibrate.data.token_rows import TokenRows
from ...calibrate.model.source import Source
from ...recipes.schema import Recipe, dump
from ...recipes.scheme import kinds
from ...recipes.scheme.kinds import Written
from ..plan import Plan

TEMPLATE = """\
---
base_model: {base}
library_name: transformers
tags: [{tags}]
---
# {base}, compressed by lmpress

| | |
|---|---|
| method | {methods} |
| weights | {weights} |
| bytes of the weight files | {before:,} → {after:,} ({share:.1%}) |
| bits per compressed weight, all included | {bits:.3f} |
| calibration | {calibration} |
| format | {format} |
{adaptations}
## Loading

{loading}
`lmpress.load(path)` loads it with the weights as they are stored.

## Recipe

`recipe.yaml` in this folder made it; `report.json` holds the figures of every layer and the versions.

```yaml
{recipe}```
"""


def render(source: Source, plan: Plan, recipe: Recipe, rows: TokenRows | None) -> str:
    """The text of README.md. It contains no time, path or machine, so that equal runs give equal cards."""
    written = _written(plan)
    kind = kinds.kind_of(written.layers[0])
    return TEMPLATE.format(
        base=source.name,
        tags=f"{kind.tags}, lmpress",
        format=kind.stored_as(written),
        methods=" → ".join(entry.method for entry in recipe.passes),
        weights=_weights(plan),
        before=plan.bytes_before,
        after=plan.bytes_after,
        share=plan.bytes_after / plan.bytes_before,
        bits=plan.bits_per_weight,
        calibration="none"
        if rows is None
        else f"{rows.source}, {rows.tokens:,} tokens, sha256 {rows.fingerprint[:12]}",
        adaptations="".join(f"| {kind} | {note} |\n" for kind, note in _further(plan)),
        loading=kind.loading(written),
        recipe=dump(recipe),
    )


def _further(plan: Plan) -> list[tuple[str, str]]:
    """Rows of the table that not every card has."""
    others = "compressed-tensors rounds to its scales" if plan.attentions else "other loaders do not"
    cache = [] if plan.kv is None else [("cache", f"{plan.kv}: `lmpress.load` packs it, {others}")]
    tables = [
        ("table", f"{table.name}, {table.shape[0]:,} rows, {kinds.kind_of(table.args).label(table.args)}")
        for table in plan.tables
    ]
    return tables + cache + [("adapted", note) for note in plan.notes]


def _weights(plan: Plan) -> str:
    args = next(iter(plan.quantized.values()))
    counts = f"{len(plan.quantized)} layers, {len(plan.dense)} of the blocks' linears kept dense"
    inputs = ""
    if plan.inputs is not None:
        inputs = f", int{plan.inputs.bits} {'dynamic' if plan.inputs.dynamic else 'static'} inputs"
    return f"{kinds.kind_of(args).label(args)}{inputs}, {counts}"


def _written(plan: Plan) -> Written:
    conv1d = any(layer.kind == "Conv1D" for layer in plan.layers if layer.args)
    return Written(tuple(plan.quantized.values()), plan.inputs, bool(plan.tables), conv1d)

"""The model card of a compressed checkpoint: what it is, what made it, where it loads."""

from ...calibrate.data.token_rows import TokenRows
from ...calibrate.model.source import Source
from ...recipes.schema import Recipe, dump
from ...recipes.scheme import PruneArgs, QuantArgs, WeightArgs
from ..formats import int_quantized, pack_quantized
from ..formats.gguf import stored as gguf
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

`recipe.yaml` beside this file made it; `report.json` holds the figures of every layer and the versions.

```yaml
{recipe}```
"""

SYMMETRIC = """\
`AutoModelForCausalLM.from_pretrained(path)` loads it in plain transformers with `compressed-tensors` installed
(checked with transformers 5.23.0 and compressed-tensors 0.20.0{bits_note}).
"""
ASYMMETRIC = """\
Asymmetric weights: transformers loads them with compressed-tensors 0.15 to 0.17, and with 0.18 to 0.20 only by
`quantization_config=CompressedTensorsConfig(dequantize=True)`: those versions refuse packed zero points otherwise.
"""
SPQR = """\
SpQR has a format of its own here: no other runtime serves it.
"""
NF4 = """\
`AutoModelForCausalLM.from_pretrained(path)` loads it in plain transformers with `bitsandbytes` installed
(checked with transformers 5.23.0 and bitsandbytes 0.50.2).
"""
COLUMNS = """\
No other runtime keeps columns in 16 bits; `compress export --format bitsandbytes` writes the 8-bit part of all columns for
bitsandbytes' own LLM.int8.
"""
BLOCKS = """\
The weights lie in the blocks of GGUF: `compress export --format gguf` writes the file that llama.cpp loads, bit for bit.
"""
LOW_RANK = """\
No other runtime adds the low-rank terms to the weights: transformers refuses the checkpoint.
"""
OWN = """\
Its linear layers are `Conv1D` modules, which compressed-tensors cannot serve: transformers refuses the checkpoint.
"""
TABLES = """\
Its table of embeddings is packed as well, which transformers does not serve: it refuses the checkpoint. `compress export`
writes it as GGUF, or dense.
"""
SPARSE = """\
No other runtime reads sparse weights of this layout (`compress/formats/sparse.py` says what it is): transformers refuses it.
"""
DENSE = """\
`AutoModelForCausalLM.from_pretrained(path)` loads it in plain transformers. The zeros are stored: the files are not smaller.
"""


def render(source: Source, plan: Plan, recipe: Recipe, rows: TokenRows | None) -> str:
    """The text of README.md. Holds no time, path or machine: equal runs give equal cards."""
    return TEMPLATE.format(
        base=source.name,
        tags=_tags(plan),
        format=_format(plan),
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
        loading=_loading(plan),
        recipe=dump(recipe),
    )


def _further(plan: Plan) -> list[tuple[str, str]]:
    """Rows of the table that not every card has."""
    others = "compressed-tensors rounds to its scales" if plan.attentions else "other loaders do not"
    cache = [] if plan.kv is None else [("cache", f"{plan.kv}: `lmpress.load` packs it, {others}")]
    tables = [("table", f"{table.name}, {table.shape[0]:,} rows, {_grid(table.args)}") for table in plan.tables]
    return tables + cache + [("adapted", note) for note in plan.notes]


def _weights(plan: Plan) -> str:
    args = next(iter(plan.quantized.values()))
    counts = f"{len(plan.quantized)} layers, {len(plan.dense)} of the blocks' linears kept dense"
    if isinstance(args, PruneArgs):
        amount = (
            args.pattern
            if args.n_of_m
            else f"{args.sparsity:.1%}" + (f" in blocks {args.pattern}" if args.pattern else "")
        )
        return f"{amount} pruned, {args.dtype}, {counts}"
    word = _grid(args)
    word += f" with terms of rank {args.rank}" if args.rank else ""
    inputs = (
        ""
        if plan.inputs is None
        else f", int{plan.inputs.bits} {'dynamic' if plan.inputs.dynamic else 'static'} inputs"
    )
    return f"{word}{inputs}, {counts}"


def _grid(args: WeightArgs | None) -> str:
    assert isinstance(args, QuantArgs)
    kind = "symmetric" if args.symmetric else "asymmetric"
    return args.block or ("NF4" if args.formula == "nf4" else f"int{args.bits} {kind}")


def _tags(plan: Plan) -> str:
    args = next(iter(plan.quantized.values()))
    if isinstance(args, PruneArgs):
        return "pruned, lmpress"
    kinds = {"grid": "compressed-tensors", "two-level": "spqr", "nf4": "bitsandbytes", "columns": "llm-int8"}
    kinds |= {"low-rank": "lorc", "blocks": "gguf"}
    return f"quantized, {kinds[args.kind]}, lmpress"


def _format(plan: Plan) -> str:
    args = next(iter(plan.quantized.values()))
    if isinstance(args, PruneArgs):
        return f"`{args.storage}`"
    if args.kind != "grid":
        own = {"two-level": "SpQR tiles of lmpress", "columns": "int8 with 16-bit columns, of lmpress"}
        own |= {"low-rank": "packed codes and low-rank terms of lmpress", "blocks": f"`{gguf.NAME}` of lmpress"}
        return own.get(args.kind, "bitsandbytes NF4")
    int8 = plan.inputs is not None and all(int_quantized.holds_int8(a) for a in plan.quantized.values())
    return f"compressed-tensors `{int_quantized.NAME if int8 else pack_quantized.NAME}`"


def _loading(plan: Plan) -> str:
    pruned = [a for a in plan.quantized.values() if isinstance(a, PruneArgs)]
    if pruned:
        return DENSE if all(a.storage == "dense" for a in pruned) else SPARSE
    args = [a for a in plan.quantized.values() if isinstance(a, QuantArgs)]
    if args[0].kind != "grid":
        return {"two-level": SPQR, "nf4": NF4, "columns": COLUMNS, "low-rank": LOW_RANK, "blocks": BLOCKS}[args[0].kind]
    if plan.tables:
        return TABLES
    if any(layer.kind == "Conv1D" for layer in plan.layers if layer.args):
        return OWN
    if not all(a.symmetric for a in args):
        return ASYMMETRIC
    dense_stream = any(a.bits not in (2, 4, 8) for a in args)
    return SYMMETRIC.format(bits_note="; these bit widths need 0.18 or later" if dense_stream else "")

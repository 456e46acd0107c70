"""The model card of a compressed checkpoint: what it is, what made it, where it loads."""

from ...calibrate.rows import Rows
from ...calibrate.source import Source
from ...recipes.schema import Recipe, dump
from ..plan import Plan

TEMPLATE = """\
---
base_model: {base}
library_name: transformers
tags: [quantized, compressed-tensors, lmpress]
---
# {base}, compressed by lmpress

| | |
|---|---|
| method | {methods} |
| weights | {weights} |
| bytes of the weight files | {before:,} → {after:,} ({share:.1%}) |
| bits per quantized weight, scales included | {bits:.3f} |
| calibration | {calibration} |
| format | compressed-tensors `pack-quantized` |
{adaptations}
## Loading

{loading}
`lmpress.load(path)` loads it with the weights packed in memory.

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
OWN = """\
Its linear layers are `Conv1D` modules, which compressed-tensors cannot serve: transformers refuses the checkpoint.
"""


def render(source: Source, plan: Plan, recipe: Recipe, rows: Rows | None) -> str:
    """The text of README.md. Holds no time, path or machine: equal runs give equal cards."""
    return TEMPLATE.format(
        base=source.name,
        methods=" → ".join(entry.method for entry in recipe.passes),
        weights=_weights(plan),
        before=plan.bytes_before,
        after=plan.bytes_after,
        share=plan.bytes_after / plan.bytes_before,
        bits=plan.bits_per_weight,
        calibration="none"
        if rows is None
        else f"{rows.source}, {rows.tokens:,} tokens, sha256 {rows.fingerprint[:12]}",
        adaptations="".join(f"| adapted | {note} |\n" for note in plan.notes),
        loading=_loading(plan),
        recipe=dump(recipe),
    )


def _weights(plan: Plan) -> str:
    args = next(iter(plan.quantized.values()))
    kind = "symmetric" if args.symmetric else "asymmetric"
    return f"int{args.bits} {kind}, {len(plan.quantized)} layers, {len(plan.dense)} of the blocks' linears kept dense"


def _loading(plan: Plan) -> str:
    if any(layer.kind == "Conv1D" for layer in plan.layers if layer.args):
        return OWN
    args = plan.quantized.values()
    if not all(a.symmetric for a in args):
        return ASYMMETRIC
    dense_stream = any(a.bits not in (2, 4, 8) for a in args)
    return SYMMETRIC.format(bits_note="; these bit widths need 0.18 or later" if dense_stream else "")

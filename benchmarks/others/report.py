"""What `interop.py` found, as Markdown: cell by cell, and the worst of every format for the README."""

from collections.abc import Mapping, Sequence
from typing import Any

from cells import ENVIRONMENTS, WEIGHTS
from lmpress.compress.plan import LayerPlan
from lmpress.compress.runtime_support import TARGETS, faults

HEAD = """# Formats and runtimes

The output of `make interop`: each cell is a checkpoint that the runtime loaded in a fresh process, in an environment of its own
with the versions below, on a CPU. {models}

    compress quantize MODEL -o CKPT --method rtn --bits 4 --group-size 32
    compress export CKPT -o OUT --format gptq
    compress verify OUT --against CKPT --runtime transformers --python ENVIRONMENT/bin/python

- **exact**: every weight that the runtime serves equals ours bit for bit; else how far the farthest one is off, in steps of its
  grid (half a step would be a wrong code). Behind it the largest difference of a logit on 128 random tokens, in standard
  deviations of the logits: what the runtime's own arithmetic costs.
- **refused**: the runtime does not load it; its own words stand below, by number.
- **GPU**: its loader reads such a checkpoint by its source, nothing was run (these runtimes need an accelerator here).
- empty: the runtime has no reader for the format.

"""
GPU = {"vLLM 0.33": "vllm", "SGLang 0.5": "sglang"}  # runtimes that were read and not run, and their names as targets
WIDTH = 1024


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """The matrix, the runtimes' words, and what was measured cell by cell."""
    environments = list(dict.fromkeys(each["environment"] for each in results))
    rows = list(dict.fromkeys((each["format"], each["weights"]) for each in results))
    rows.sort(key=lambda row: [each["format"] for each in results].index(row[0]))
    words: list[str] = []
    title = [*environments, *GPU]
    lines = [f"| format | weights | {' | '.join(title)} |", "|---" * (len(title) + 2) + "|"]
    for kind, weights in rows:
        cells = [
            _cell([r for r in results if (r["format"], r["weights"], r["environment"]) == (kind, weights, name)], words)
            for name in environments
        ]
        cells += ["GPU" if _read_by(target, kind, weights) else "" for target in GPU.values()]
        lines.append(f"| `{kind}` | {weights} | {' | '.join(cells)} |")
    names = list(dict.fromkeys(each["model"] for each in results))
    head = HEAD.format(models=f"Models: {' and '.join(names)}, the largest figure of them.")
    numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(words, 1))
    below = numbered + "\n\n" + _not_run(results) + _versions(results, environments) + _detail(results)
    return head + "\n".join(lines) + "\n\n" + below


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """A line per format, a column per runtime: the worst of the cells that it serves, their number, and how many it refuses."""
    environments = list(dict.fromkeys(each["environment"] for each in results))
    lines = [f"| format | {' | '.join(environments)} |", "|---" * (len(environments) + 1) + "|"]
    for kind in dict.fromkeys(each["format"] for each in results):
        cells = []
        for name in environments:
            asked = [each for each in results if (each["format"], each["environment"]) == (kind, name)]
            served = [each for each in asked if each["steps"] is not None]
            parts = [f"{_cell(served, [])} ({len(served)})"] if served else []
            parts += [f"{len(asked) - len(served)} refused"] if len(asked) > len(served) else []
            cells.append("; ".join(parts))
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _not_run(results: Sequence[Mapping[str, Any]]) -> str:
    """The cells without a result."""
    known = {(each["model"], each["environment"], each["format"], each["weights"]) for each in results}
    missing = [
        f"{model}: `{kind}`, {weights} ({name})"
        for index, model in enumerate(dict.fromkeys(each["model"] for each in results))
        for name, environment in ENVIRONMENTS.items()
        for kind, weights in environment.cells(first_only=index > 0)
        if (model, name, kind, weights) not in known
    ]
    return f"Not run yet: {'; '.join(missing)}.\n\n" if missing else ""


def _read_by(target: str, kind: str, weights: str) -> bool:
    """Whether `lmpress.compress.runtime_support` says that the runtime reads it."""
    made = WEIGHTS[weights]
    layer = LayerPlan("layer", 0, "Linear", (WIDTH, WIDTH), made.args, 0)
    containers = [container for container in TARGETS[target] if container.format == kind]
    return any(not list(faults([layer], container, made.inputs)) for container in containers)


def _cell(found: Sequence[Mapping[str, Any]], words: list[str]) -> str:
    """The worst of the models that it loads, and who is refused."""
    served = [each for each in found if each["steps"] is not None]
    parts = []
    if served:
        steps, logits = (max(each[name] for each in served) for name in ("steps", "logits"))
        wrong = "**WRONG** " if any(each["verdict"] == "WRONG" for each in served) else ""
        parts.append(f"{wrong}{'exact' if steps == 0 else f'{steps:.1g} steps'}, {f'{logits:.0e}' if logits else '0'}")
    for each in [each for each in found if each["steps"] is None]:
        text = f"`{each['told'].replace('`', '').replace('|', '/')}`"
        if text not in words:
            words.append(text)
        parts.append(f"{each['model'] if served else ''} {each['verdict']} ({words.index(text) + 1})".strip())
    return "; ".join(dict.fromkeys(parts))


def _versions(results: Sequence[Mapping[str, Any]], environments: Sequence[str]) -> str:
    lines = ["Versions:", ""]
    for name in environments:
        known = dict.fromkeys(r["versions"] for r in results if r["environment"] == name and r["versions"])
        lines.append(f"- {name}: {'; '.join(known) or 'nothing was loaded'}")
    return "\n".join(lines) + "\n"


def _detail(results: Sequence[Mapping[str, Any]]) -> str:
    lines = ["", "## Cell by cell", "", "| model | format | weights | environment | verdict | steps | logits | KL |"]
    lines.append("|---" * 8 + "|")
    for r in results:
        figures = [("" if r[name] is None else f"{r[name]:.2g}") for name in ("steps", "logits", "kl")]
        start = [r["model"], f"`{r['format']}`", r["weights"], r["environment"], r["verdict"]]
        lines.append(f"| {' | '.join([*start, *figures])} |")
    return "\n".join(lines) + "\n"

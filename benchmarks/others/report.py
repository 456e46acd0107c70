"""What `interop.py` found, as Markdown: every cell for docs/interop.md, and one row per format for README.md."""

from collections import Counter
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

- **exact**: every weight that the runtime computes with equals the checkpoint's bit for bit; otherwise the cell gives the
  largest difference of a weight in steps of its grid (half a step would be a wrong code). The second figure is the largest
  difference of a logit on 128 random tokens, in standard deviations of the logits: it comes from the runtime's own arithmetic.
- **refused**: the runtime does not load the checkpoint; its message is below, by number.
- **GPU**: according to its source the runtime's loader reads such a checkpoint; nothing was run (these runtimes need a GPU).
- empty: the runtime has no reader for the format.

"""
# Runtimes whose source was read and that were not run, with their names as targets.
GPU = {
    "vLLM 0.33": "vllm",
    "SGLang 0.5": "sglang",
}
WIDTH = 1024


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """The page: the matrix, the messages of runtimes that refuse, and the figures of every cell."""
    environments = list(dict.fromkeys(each["environment"] for each in results))
    rows = list(dict.fromkeys((each["format"], each["weights"]) for each in results))
    rows.sort(key=lambda row: [each["format"] for each in results].index(row[0]))
    messages: list[str] = []
    title = [*environments, *GPU]
    lines = [f"| format | weights | {' | '.join(title)} |", "|---" * (len(title) + 2) + "|"]
    for kind, weights in rows:
        cells = [
            _cell(
                [r for r in results if (r["format"], r["weights"], r["environment"]) == (kind, weights, name)], messages
            )
            for name in environments
        ]
        cells += ["GPU" if _read_by(target, kind, weights) else "" for target in GPU.values()]
        lines.append(f"| `{kind}` | {weights} | {' | '.join(cells)} |")
    names = list(dict.fromkeys(each["model"] for each in results))
    head = HEAD.format(models=f"Models: {' and '.join(names)}; a figure is the largest of these models.")
    numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(messages, 1))
    below = numbered + "\n\n" + _not_run(results) + _versions(results, environments) + _detail(results)
    return head + "\n".join(lines) + "\n\n" + below


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """One row per format: the runtimes that load it and those that refuse it, each with its number of cells, and the largest
    differences of a weight and of a logit."""
    titles = ("format", "loaded by (cells)", "weights off by", "logits off by", "refused by (cells)")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for kind in dict.fromkeys(each["format"] for each in results):
        cells = [each for each in results if each["format"] == kind]
        loaded = [each for each in cells if each["steps"] is not None]
        off = _cell(loaded, []).partition(", ")
        lines.append(f"| `{kind}` | {_counted(loaded)} | {off[0]} | {off[2]} | {_counted(cells, refused=True)} |")
    return "\n".join(lines) + "\n"


def _counted(cells: Sequence[Mapping[str, Any]], refused: bool = False) -> str:
    """Environments with their numbers of `cells` that were loaded, or refused."""
    counts = Counter(each["environment"] for each in cells if (each["steps"] is None) == refused)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _not_run(results: Sequence[Mapping[str, Any]]) -> str:
    """The cells without a result, in words."""
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
    """Whether the runtime reads these weights in this format, according to `lmpress.compress.runtime_support`."""
    made = WEIGHTS[weights]
    layer = LayerPlan("layer", 0, "Linear", (WIDTH, WIDTH), made.args, 0)
    containers = [container for container in TARGETS[target] if container.format == kind]
    return any(not list(faults([layer], container, made.inputs)) for container in containers)


def _cell(found: Sequence[Mapping[str, Any]], messages: list[str]) -> str:
    """The largest differences over the models that the runtime loads, and the models that it refuses."""
    loaded = [each for each in found if each["steps"] is not None]
    parts = []
    if loaded:
        steps, logits = (max(each[name] for each in loaded) for name in ("steps", "logits"))
        wrong = "**WRONG** " if any(each["verdict"] == "WRONG" for each in loaded) else ""
        parts.append(f"{wrong}{'exact' if steps == 0 else f'{steps:.1g} steps'}, {f'{logits:.0e}' if logits else '0'}")
    for each in [each for each in found if each["steps"] is None]:
        text = f"`{each['reason'].replace('`', '').replace('|', '/')}`"
        if text not in messages:
            messages.append(text)
        parts.append(f"{each['model'] if loaded else ''} {each['verdict']} ({messages.index(text) + 1})".strip())
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

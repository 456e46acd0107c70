"""Evaluations and inspections as tables for people."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .dispatch_report import Served
from .inspect import Inspection
from .perplexity import Evaluation
from .timing.bench import Bench, Timing
from .timing.speed import ANSWER, PROMPT, ROUNDS, Speed
from .verify import Finding, Verification

ABSENT = "-"
WHOLE = 32  # a name of at most so many characters stays in one line; a longer one is folded, never cut


def named_table(titles: Sequence[str], names: Iterable[str], caption: str | None = None) -> Table:
    """A table whose first column holds the `names` whole, however narrow the terminal is; the other columns are figures,
    set to the right."""
    # Text, not str: rich would read the brackets of a protocol or of a name as markup.
    result = Table(caption=None if caption is None else Text(caption), caption_justify="left")
    longest = max(map(len, names), default=0)
    result.add_column(titles[0], no_wrap=longest <= WHOLE, overflow="fold")
    for title in titles[1:]:
        result.add_column(title, justify="right")
    return result


def table(evaluations: Mapping[str, Evaluation]) -> Table:
    """One row per evaluation, by the model's name. The caption is the protocol; if the protocols differ, each model's."""
    protocols = {name: each.protocol for name, each in evaluations.items()}
    shared = len(set(protocols.values())) == 1
    lines = set(protocols.values()) if shared else [f"{name}: {protocol}" for name, protocol in protocols.items()]
    packed = any(each.cache_bytes for each in evaluations.values())
    titles = [
        "model",
        "perplexity ±",
        "KL to base ±",
        "top-1",
        "Δnll ±",
        "tok/s",
        *(["cache per row"] if packed else []),
    ]
    result = named_table(titles, evaluations, "\n".join(lines))
    for name, each in evaluations.items():
        result.add_row(Text(name), *_cells(each), *([_cache(each)] if packed else []))
    return result


def _cells(figures: Evaluation) -> list[str]:
    return [
        _with_error(figures.perplexity, figures.perplexity_stderr, "z.3f"),
        _with_error(figures.kl, figures.kl_stderr, "z.5f"),
        ABSENT if figures.top1_agreement is None else f"{figures.top1_agreement:.2%}",
        _with_error(figures.nll_difference, figures.nll_difference_stderr, "+z.5f"),
        f"{figures.tokens_per_second:,.0f}",
    ]


def _cache(figures: Evaluation) -> str:
    if figures.cache_bytes is None or not figures.cache_bytes_base:
        return ABSENT
    return f"{figures.cache_bytes:,} B, {figures.cache_bytes / figures.cache_bytes_base:.1%}"


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return ABSENT
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.removeprefix('+')}}"


def verification(found: Verification) -> Table:
    """What `compress verify` shows: one row per runtime."""
    lines = [f"{found.checkpoint} against the dequantized weights of {found.against}"]
    if found.itself:
        lines.append(
            "without --against only the integrity of the checkpoint can be checked, not that its weights are those intended: "
            + _integrity(found.checked)
        )
    for each in found.findings if found.original else ():
        if each.original is not None:
            distance = f"KL {each.original.kl:.2g}, top-1 {each.original.top1:.1%}"
            lines.append(
                f"{each.runtime}, distance to the dense {found.original} on random tokens: {distance} (not judged)"
            )
    result = Table(caption=Text("\n".join(lines)), caption_justify="left")
    for title in ("runtime", "weights, steps off", "logits, std off", "KL", "top-1", "verdict"):
        result.add_column(title, justify="left" if title in ("runtime", "verdict") else "right")
    for each in found.findings:
        versions = ", ".join(f"{name} {number}" for name, number in each.versions.items())
        figures = [_figure(value, form) for value, form in zip(_measured(each), ("g", "g", "g", "%"), strict=True)]
        result.add_row(Text(f"{each.runtime}\n{versions}".strip()), *figures, Text(_verdict(each)))
    return result


def _measured(finding: Finding) -> tuple[float | None, ...]:
    outputs = finding.outputs
    return (finding.steps, *((None,) * 3 if outputs is None else (outputs.logits, outputs.kl, outputs.top1)))


def _figure(value: float | None, form: str) -> str:
    return ABSENT if value is None else f"{value:.1%}" if form == "%" else f"{value:.2g}"


def _verdict(finding: Finding) -> str:
    if finding.ok:
        return "equal" if finding.steps == 0 else "equal within the runtime's number type"
    if finding.error is not None:
        return f"FAILED: {finding.error}"
    tensors = f"wrong weight of {', '.join(finding.wrong_layers[:3])}" if finding.wrong_layers else "weights correct"
    block = "" if finding.block is None else f", outputs diverge from block {finding.block} on"
    return f"WRONG: {tensors}{block}"


def inspection(found: Inspection, kernels: Sequence[Served] = ()) -> Group:
    """What `compress inspect` shows."""
    facts = Table.grid(padding=(0, 2))
    context = "no limit" if found.context is None else f"{found.context:,} tokens"
    tied = "tied to the head" if found.tied_embeddings else "not tied"
    for name, value in (
        ("model", found.path),
        ("architecture", found.architecture),
        ("parameters", f"{found.parameters:,}"),
        ("weight files", f"{found.files}, {found.nbytes:,} bytes"),
        (
            "dtypes",
            ", ".join(f"{dtype} {share / sum(found.dtypes.values()):.1%}" for dtype, share in found.dtypes.items()),
        ),
        ("blocks", f"{found.block_count} in {found.blocks}"),
        ("context", context),
        ("vocabulary", f"{found.vocabulary:,}, embeddings {tied}"),
        ("tokenizer", "yes" if found.tokenizer else "none in the directory"),
        ("quantization", found.quantization or "none"),
        ("integrity", _integrity(found.checked)),
    ):
        facts.add_row(name, Text(value))
    layers = Table("linear layer", "module", "out x in", "count", "stored as")
    for kind in found.linears:
        rows, columns = kind.shape
        layers.add_row(Text(kind.name), kind.module, f"{rows} x {columns}", str(kind.count), Text(kind.stored))
    return Group(facts, layers, *([_kernels(kernels)] if kernels else []))


def _integrity(checked: bool) -> str:
    return "the weight files match lmpress.json" if checked else "unknown: there is no lmpress.json"


def _kernels(kernels: Sequence[Served]) -> Table:
    rejected = {name: reason for each in kernels for name, reason in each.passed_over.items()}
    caption = Text("\n".join(f"not {name}: {reason}" for name, reason in rejected.items()))
    result = Table("packed layer", "count", "served as", "inputs", "kernel", caption=caption, caption_justify="left")
    for each in kernels:
        result.add_row(Text(each.layer), str(each.count), Text(each.stored), each.inputs, Text(each.kernel))
    return result


def timings(found: Bench) -> Group:
    """What `compress bench` shows: one table per shape and number of input rows."""
    machine = found.machine
    facts = f"{machine.name}, torch {machine.torch}; medians of {machine.clock}"
    rates = f"reads {machine.read_rate:.1f} GB/s, multiplies {machine.product_rate:.0f} GFLOP/s in {machine.dtype}"
    groups = groupby(found.timings, key=lambda t: (t.rows, t.columns, t.inputs))
    return Group(*(_timing_table(list(each), machine.dtype) for _, each in groups), Text(f"{facts}\n{rates}"))


def _timing_table(found: Sequence[Timing], baseline: str) -> Table:
    first = found[0]
    titles = ("product", "ms", f"times {baseline}", "of roofline", "error")
    result = named_table(titles, [each.name for each in found])
    result.title, result.title_justify = f"{first.rows} x {first.columns}, {first.inputs} row(s) of inputs", "left"
    for each in found:
        if each.median_ms is None or each.ratio is None or each.roofline is None:
            result.add_row(Text(each.name), "wrong", ABSENT, ABSENT, f"{each.error:.1e}")
        else:
            figures = (f"{each.median_ms:.3f}", f"{each.ratio:.2f}", f"{each.roofline:.0%}", f"{each.error:.1e}")
            result.add_row(Text(each.name), *figures)
    return result


def speeds(found: Sequence[Speed]) -> Table:
    """What `compress eval --speed` adds: one row per model."""
    titles = ("model", "prefill, tok/s", "decode, tok/s", "weights", "peak memory", "kernels")
    caption = f"a prompt of {PROMPT} tokens, then {ANSWER} tokens one at a time; medians of {ROUNDS} rounds"
    result = named_table(titles, [each.name for each in found], caption)
    result.columns[-1].justify = "left"
    for each in found:
        blocks = {f"blocks {way}": count for way, count in each.blocks.items()}
        kernels = ", ".join(f"{count} {name}" for name, count in (each.kernels | blocks).items())
        rates = (_rate(each.prefill, each.prefill_ratio), _rate(each.decode, each.decode_ratio))
        sizes = (f"{n / 1e6:,.1f} MB" for n in (each.weight_bytes, each.peak_bytes))
        result.add_row(Text(each.name), *rates, *sizes, Text(kernels or ABSENT))
    return result


def _rate(rate: float, ratio: float | None) -> str:
    return f"{rate:,.1f}" + ("" if ratio is None else f" ({ratio:.2f}x)")

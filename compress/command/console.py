"""What a run shows: progress with the time left, warnings as they come, reports, and every event in a log file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..chain import ChainReport
from ..export import ExportReport
from ..plan import Plan
from ..report.progress import Event, Observer
from ..report.verdict import output_errors
from ..run import RunReport
from ..structured.pipeline import DistillReport
from .log import log_to

DOING = {
    "plan": "planning",
    "resume": "resuming",
    "allocate": "measuring the sensitivity of each layer",
    "capture": "reading the calibration rows",
    "load": "loading",
    "collect": "collecting statistics",
    "solve": "solving",
    "forward": "running the compressed block",
    "write": "writing",
    "judge": "comparing the predictions with the original's",
    "assemble": "assembling the checkpoint",
    "evaluate": "evaluating",
    "bench": "timing kernels",
    "speed": "timing the models",
    "distill": "distilling",
}


@contextmanager
def watching(console: Console, log_file: Path | None = None) -> Iterator[Observer]:
    """An observer that draws progress on `console` and writes one line per event to `log_file`."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
        disable=console.quiet,
    )

    def warn(message: str) -> None:
        console.print(Text.assemble(("warning: ", "yellow"), message))

    with log_to(log_file, warn) as log, progress:
        task = progress.add_task("starting", total=None, left="")
        pace = Pace()

        def observe(event: Event) -> None:
            log.info("%s", _line(event))
            if event.phase == "warning":
                warn(event.message or "")
                return
            if event.phase == "resume":
                console.print(_resuming(event), highlight=False)
            finished, left = pace.after(event, time.monotonic())
            progress.update(
                task,
                description=DOING.get(event.phase, event.phase),
                completed=finished,
                total=event.blocks or None,
                left=left,
            )

        yield observe


@dataclass
class Pace:
    """How far a run is, and the time that the rest takes: blocks that an earlier run finished do not count."""

    _started: dict[str, float] = field(default_factory=dict)
    _resumed: int = 0

    def after(self, event: Event, now: float) -> tuple[int, str]:
        """The number of finished blocks after `event`, which came at the time `now` in seconds, and the time left in words."""
        kind = event.phase if event.phase in ("evaluate", "allocate") else "run"
        finished = event.block + (event.phase == "block") if kind == "run" else event.block
        if event.phase == "resume":
            self._resumed = event.block
            return 0, ""
        resumed = self._resumed if kind == "run" else 0
        if finished <= resumed:  # what is only read again is faster than what is left
            self._started[kind] = now
        begun = self._started.setdefault(kind, now)
        return finished, _time_left(now - begun, finished - resumed, event.blocks - resumed)


def _resuming(event: Event) -> str:
    if event.block < event.blocks:
        return f"resuming at block {event.block + 1} of {event.blocks}"
    return f"resuming after the last of {event.blocks} blocks"


def _time_left(elapsed: float, finished: int, total: int) -> str:
    """The time that the rest takes at the present rate; empty before the first block is finished."""
    if not finished or finished >= total:
        return ""
    left = elapsed / finished * (total - finished)
    return f"about {int(left) // 60}:{int(left) % 60:02d} left"


def _line(event: Event) -> str:
    where = f" {event.block + 1}/{event.blocks}" if event.block < event.blocks else ""
    figures = " ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in event.figures.items())
    return " ".join(part for part in (event.phase + where, event.layer, event.message, figures) if part)


def print_plan(console: Console, plan: Plan) -> None:
    """The plan of a run, before it starts."""
    console.print(
        f"{len(plan.quantized)} layers in {plan.blocks} blocks to compress, {len(plan.dense)} kept dense; "
        f"{size(plan.bytes_before)} -> {size(plan.bytes_after)} exactly",
        highlight=False,
    )
    for note in plan.notes:
        console.print(Text(f"  {note}", style="yellow"))


def print_report(console: Console, report: RunReport) -> None:
    """The last lines of a run."""
    share = report.bytes_after / report.bytes_before
    verdict = report.verdict
    lines = [
        f"{size(report.bytes_before)} -> {size(report.bytes_after)} ({share:.1%}); "
        f"{report.bits_per_weight:.2f} bits per compressed weight, scales included",
        f"{report.seconds:.1f} s, peak memory {size(report.peak_bytes)}",
        *_worst(report),
        *_fidelity(report),
        f"{verdict.word}: {verdict.reason}" if verdict.reason else verdict.word,
        f"written to {report.out}",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_export(console: Console, report: ExportReport) -> None:
    """What an export wrote, and in what it differs from the checkpoint."""
    for note in report.notes:
        console.print(Text.assemble(("note: ", "yellow"), note))
    console.print(
        f"{size(report.bytes_before)} -> {size(report.bytes_after)} as {report.format}, {report.seconds:.1f} s\n"
        f"written to {report.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def print_chain(console: Console, report: ChainReport) -> None:
    """The last lines of a chain."""
    for number, record in enumerate(report.stages, start=1):
        console.print(f"stage {number}: {record['stage']}, {size(record['bytes'])}", highlight=False)
    share = report.bytes_after / report.bytes_before
    lines = [
        f"{size(report.bytes_before)} -> {size(report.bytes_after)} ({share:.1%}), {report.seconds:.1f} s",
        f"written to {report.out}",
        *([] if report.evaluated is None else [f"evaluated: {report.evaluated}"]),
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_distilled(console: Console, report: DistillReport) -> None:
    """The last lines of a distillation."""
    lines = [
        f"layers {', '.join(map(str, report.kept))} stay; "
        f"{report.parameters_before:,} -> {report.parameters_after:,} parameters, "
        f"{size(report.bytes_before)} -> {size(report.bytes_after)}"
    ]
    curve = report.history.curve
    if curve:
        best = next(kl for step, _, kl in curve if step == report.history.best_step)
        lines.append(
            f"KL divergence to the teacher on held-out rows {curve[0][2]:.4f} -> {best:.4f} "
            f"(step {report.history.best_step} of {curve[-1][0]}), {report.seconds:.1f} s"
        )
    console.print("\n".join([*lines, f"written to {report.out}"]), highlight=False, markup=False, soft_wrap=True)


def _worst(report: RunReport) -> list[str]:
    """The layer with the largest relative output error, if errors were measured."""
    errors = output_errors(report.layers)
    if not errors:
        return []
    worst = max(errors, key=lambda name: errors[name])
    when = " before training" if any("block_loss" in layer for layer in report.layers) else ""
    median = sorted(errors.values())[len(errors) // 2]
    return [f"output error{when}: median {median:.3f}, largest {errors[worst]:.3f} ({worst})"]


def _fidelity(report: RunReport) -> list[str]:
    """The predictions against those of the original, if they were measured."""
    found = report.fidelity
    if found is None:
        return []
    where = "held-out tokens" if found.held_out else "tokens that calibrated it, as there is no other text,"
    return [
        f"{found.tokens} {where} of {found.source}: KL divergence {found.kl:.4f}, same next token "
        f"{found.top1_agreement:.1%}, perplexity {found.perplexity_base:.2f} -> {found.perplexity:.2f}"
    ]


def size(nbytes: int) -> str:
    """Bytes in decimal units, as file managers and model hubs show them."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"

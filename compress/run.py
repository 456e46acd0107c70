"""A run: one recipe on one model. It is opened and planned once, printed from its plan, and executed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel

from ..calibrate.data.token_rows import TokenRows, calibration_rows, held_out_rows
from ..calibrate.fidelity import Fidelity, FidelityMeter
from ..calibrate.model.skeleton import build, context_length, device_of
from ..calibrate.model.source import Source
from ..errors import CompressError
from ..recipes.naming import default_out
from ..recipes.schema import Recipe
from .allocation.allocate import allocated, most_bytes, uniform
from .formats.source import open_source
from .formats.tokenizer import load_tokenizer
from .output.target import claimed
from .pipeline import compress_blocks, needs_calibration, round_tables
from .plan import Plan, make_plan
from .report.memory import peak_bytes, return_freed_pages
from .report.progress import Event, Observer, silent
from .report.verdict import Verdict, figures_of, judge
from .runtime_support import check as check_targets
from .workspace import Workspace

MEASURED_TOKENS, MEASURED_LENGTH = 2304, 256  # of held-out text, for the verdict


@dataclass(frozen=True)
class RunReport:
    """What a run did. `layers` holds one dictionary of figures per compressed layer; sizes are those of the weight files.

    `fidelity` compares the predictions of the result with those of the original; None if there was no text for that.
    """

    out: Path
    plan: Plan
    layers: list[dict[str, float | int | str]]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    seconds: float
    peak_bytes: int
    verdict: Verdict
    fidelity: Fidelity | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "out": str(self.out),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            **figures_of(self.verdict, self.fidelity),
            "notes": self.plan.notes,
            "layers": self.layers,
        }


@dataclass(frozen=True)
class Run:
    """A recipe on a model, planned from the config and the file headers alone.

    source, skeleton   the model's files, and the model without its weights
    recipe             what is done; if it has a budget, `plan` is that of the scheme alone until `execute` allocates it
    plan               what becomes of every tensor
    out, overwrite     where the result goes, and whether an existing one, or an unfinished run of it, is replaced
    targets            the runtimes that must be able to serve the result
    device             where blocks run
    """

    source: Source
    skeleton: PreTrainedModel
    recipe: Recipe
    plan: Plan
    out: Path
    targets: tuple[str, ...] = ()
    device: str = "cpu"
    overwrite: bool = False

    @classmethod
    def of(
        cls,
        model: str | Path,
        recipe: Recipe,
        out: str | Path | None = None,
        *,
        targets: Sequence[str] = (),
        device: str = "cpu",
        overwrite: bool = False,
    ) -> Self:
        """The run of `recipe` on the Hugging Face directory (or hub id) `model` into the directory `out`. Writes nothing.

        `out` is by default `MODEL-<methods>-w<bits>` next to the model. Raises `UsageError` if the recipe does not fit the
        model or if one of the runtimes `targets` cannot serve the result.
        """
        source = open_source(model)
        skeleton = build(source)
        plan = make_plan(source, skeleton, uniform(recipe))
        place = default_out(model, recipe) if out is None else Path(out)
        run = cls(source, skeleton, recipe, plan, place, tuple(targets), device, overwrite)
        if recipe.allocate is None:
            run.check_targets()
        return run

    def check_targets(self) -> None:
        """Raise `UsageError` if one of the runtimes `targets` cannot serve what is planned."""
        check_targets((*self.plan.layers, *self.plan.tables), self.targets, self.plan.inputs, self.plan.kv)

    @property
    def most_bytes(self) -> int | None:
        """The most bytes that the compressed layers take, if the recipe has a budget to allocate between them."""
        return None if self.recipe.allocate is None else most_bytes(self.plan, self.recipe)

    @return_freed_pages()
    def execute(self, observer: Observer = silent, on_plan: Callable[[Plan], None] | None = None) -> RunReport:
        """Do what the recipe says; `out` appears only when it is complete. `on_plan` gets the final plan before that.

        Raises `UsageError` before anything is written, `CompressError` later.
        """
        device_of(self.device)
        with (
            claimed(self.out, self.overwrite, self.source.path),
            allocated(self.source, self.skeleton, self.out, self.recipe, self.device, observer) as recipe,
        ):
            run = self if recipe is self.recipe else self._with(recipe)
            if on_plan is not None:
                on_plan(run.plan)
            return run._compress(observer)

    def _with(self, recipe: Recipe) -> Self:
        """This run after the allocation."""
        run = replace(self, recipe=recipe, plan=make_plan(self.source, self.skeleton, recipe))
        run.check_targets()
        return run

    def _compress(self, observer: Observer) -> RunReport:
        started, plan = time.monotonic(), self.plan
        observer(Event("plan", blocks=plan.blocks))
        rows = self._rows(observer) if needs_calibration(self.recipe, plan) else None
        with Workspace.open(self.out, self.source, plan, self.recipe, rows, self.overwrite) as workspace:
            if workspace.complete:
                return self._report(workspace.report(), started)
            if workspace.unfinished:
                observer(Event("resume", workspace.unfinished, plan.blocks))
            round_tables(self.skeleton, workspace)
            meter, reason = self._meter(rows, workspace.scratch)
            compress_blocks(self.skeleton, workspace, meter, self.device, observer)
            observer(Event("judge", plan.blocks, plan.blocks))
            fidelity = None if meter is None else meter.read()
            verdict = judge(workspace.layers(), [] if fidelity is None else [fidelity], reason)
            observer(Event("assemble", plan.blocks, plan.blocks))
            judged = figures_of(verdict, fidelity)
            layers = workspace.finish(judged)
        observer(Event("done", plan.blocks, plan.blocks))
        return replace(self._report({**judged, "layers": layers}, started), fidelity=fidelity)

    def _report(self, content: dict[str, Any], started: float) -> RunReport:
        """The report of a finished run from the `content` of its report.json."""
        fidelity = content.get("fidelity")
        return RunReport(
            out=self.out,
            plan=self.plan,
            layers=content["layers"],
            bytes_before=self.plan.bytes_before,
            bytes_after=self.plan.bytes_after,
            bits_per_weight=self.plan.bits_per_weight,
            seconds=time.monotonic() - started,
            peak_bytes=peak_bytes(),
            verdict=Verdict(content["verdict"], content["reason"]),
            fidelity=None if fidelity is None else Fidelity(**fidelity),
        )

    def _meter(self, rows: TokenRows | None, scratch: Path) -> tuple[FidelityMeter | None, str]:
        """What measures the fidelity, on text that no pass reads, or None and why there is none."""
        asked, limit = self.recipe.calibration, context_length(self.skeleton.config)
        used = None if rows is None else (asked.samples, rows.ids.shape[1])
        length = MEASURED_LENGTH if limit is None else min(MEASURED_LENGTH, limit)
        count = -(-MEASURED_TOKENS // length)
        try:
            tokenizer = load_tokenizer(self.source.path)
            text = held_out_rows(asked.data, tokenizer, used, length, count, self.recipe.seed)
        except CompressError as error:
            return None, f"there is no text to measure on ({error.message})"
        if text is None:
            return None, f"{asked.data} is not text to measure on"
        if int(text.ids.max()) >= self.skeleton.config.get_text_config().vocab_size:
            return None, "the tokenizer has ids that the model does not have"
        return FidelityMeter(self.skeleton, self.source, text, scratch, self.device), ""

    def _rows(self, observer: Observer) -> TokenRows:
        """The calibration rows, no longer than the model's context."""
        asked, limit = self.recipe.calibration, context_length(self.skeleton.config)
        length = asked.seq_len if limit is None else min(asked.seq_len, limit)
        if length < asked.seq_len:
            observer(
                Event("warning", message=f"rows of {length} tokens instead of {asked.seq_len}: the model's context")
            )
        rows = calibration_rows(asked.data, load_tokenizer(self.source.path), asked.samples, length, self.recipe.seed)
        for note in rows.notes:
            observer(Event("warning", message=note))
        return rows

"""Carry out a recipe for a command: plan, run, report, evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .session import Output

if TYPE_CHECKING:
    from ...recipes.schema import Recipe

BROKEN = 3


def carry_out(
    model: str,
    out: Path | None,
    recipe: "Recipe",
    overwrite: bool,
    dry_run: bool,
    evaluate_on: str | None,
    device: str,
    output: Output,
    targets: str = "",
) -> None:
    from ..api import default_out
    from ..pipeline import plan
    from ..pipeline import run as run_recipe
    from ..workspace import check_target
    from .console import print_plan, print_report, watching

    target = out or default_out(model, recipe)
    if not dry_run:
        check_target(target, overwrite)
    planned = plan(model, recipe, targets.split(",") if targets else ())
    print_plan(output.console, planned)
    if dry_run:
        output.result(
            {"bytes_before": planned.bytes_before, "bytes_after": planned.bytes_after, "notes": planned.notes}
        )
        return
    with watching(output.console, target.parent / f"{target.name}.log") as observer:
        report = run_recipe(model, target, recipe, overwrite=overwrite, device=device, observer=observer)
    print_report(output.console, report)
    output.result(report.as_dict() | evaluated(report.out, model, evaluate_on, device, output))
    if report.verdict.word == "BROKEN":
        raise typer.Exit(BROKEN)


def evaluated(made: Path, model: str, data: str | None, device: str, output: Output) -> dict[str, Any]:
    """The evaluation of the checkpoint `made` against `model`, shown and for JSON; empty where no `data` were named."""
    if data is None:
        return {}
    from ...eval.perplexity import evaluate
    from ...eval.render import table
    from .console import watching

    with watching(output.console) as observer:
        found = evaluate(made, data, against=model, device=device, progress=observer)
    output.console.print(table({made.name: found}))
    return {"evaluation": found.as_dict()}

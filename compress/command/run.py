"""Run a recipe or a chain for a command: plan, execute, report, evaluate."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...errors import UsageError
from .flags import RunFlags
from .session import Output

if TYPE_CHECKING:
    from ...recipes.chain import Chain
    from ...recipes.schema import Recipe
    from ..run import Run

BROKEN = 3
Evaluate = Callable[[Path], dict[str, Any]]  # shows the evaluation of a checkpoint, and returns its figures for JSON


def run_recipe(model: str, recipe: "Recipe", flags: RunFlags, evaluate: Evaluate | None, output: Output) -> None:
    """Run `recipe` on `model`, or with `--dry-run` print its plan. Exits with 3 if the verdict is BROKEN."""
    from dataclasses import replace

    from ..report.verdict import of_evaluation
    from ..run import Run
    from .console import print_plan, print_report, watching

    run = Run.of(model, recipe, flags.out, targets=flags.target, device=flags.device, overwrite=flags.overwrite)
    if flags.dry_run:
        preview(run, output)
        return
    with watching(output.console, run.out.parent / f"{run.out.name}.log") as observer:
        report = run.execute(observer, on_plan=lambda plan: print_plan(output.console, plan))
    evaluation = {} if evaluate is None else evaluate(report.out)
    report = replace(report, verdict=of_evaluation(report.verdict, evaluation))
    print_report(output.console, report)
    output.result(report.as_dict() | ({"evaluation": evaluation} if evaluation else {}))
    if report.verdict.word == "BROKEN":
        raise typer.Exit(BROKEN)


def preview(run: "Run", output: Output) -> None:
    """Print the plan with its exact sizes or, if layers share a budget, with the most that they may take."""
    from .console import print_plan, size

    run.check_targets()
    plan, most = run.plan, run.most_bytes
    sizes: dict[str, Any] = {"bytes_before": plan.bytes_before, "notes": plan.notes}
    if most is None:
        print_plan(output.console, plan)
        output.result(sizes | {"bytes_after": plan.bytes_after})
        return
    output.console.print(
        f"{len(plan.quantized)} layers in {plan.blocks} blocks share a budget and take {size(most)} at most; "
        "the share of each is measured when the recipe is run",
        highlight=False,
    )
    output.result(sizes | {"layer_bytes_at_most": most})


def run_chain(model: str, chain: "Chain", flags: RunFlags, evaluate: Evaluate | None, output: Output) -> None:
    """Run the stages of `chain` on `model`, or with `--dry-run` print them. Exits with 3 if a verdict is BROKEN."""
    from ...recipes.chain import default_out, kind_of
    from ..chain import run
    from ..formats.source import open_source
    from .console import print_chain, watching

    if flags.target:
        raise UsageError(
            "--target cannot be combined with a chain", "end the chain with an export to the runtime's format"
        )
    if flags.dry_run:
        names = chain.names(Path(model).name)
        for number, (stage, name) in enumerate(zip(chain.stages, names, strict=True), start=1):
            output.console.print(f"stage {number}: {kind_of(stage)} -> {name}", highlight=False)
        output.result({"bytes_before": open_source(model).nbytes, **chain.as_dict()})
        return
    target = flags.out or default_out(model, chain)
    with watching(output.console, target.parent / f"{target.name}.log") as observer:
        report = run(
            model,
            target,
            chain,
            overwrite=flags.overwrite,
            device=flags.device,
            evaluate=evaluate,
            observer=observer,
        )
    print_chain(output.console, report)
    output.result(report.as_dict())
    if any(record.get("verdict") == "BROKEN" for record in report.stages):
        raise typer.Exit(BROKEN)

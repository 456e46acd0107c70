"""Carry out a recipe for a command: plan, run, report, evaluate."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .session import Output

if TYPE_CHECKING:
    from ...recipes.chain import Chain
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
    from ...recipes.allocation import decided
    from ..api import default_out
    from ..pipeline import plan
    from ..pipeline import run as run_recipe
    from ..report.console import print_plan, print_report, watching
    from ..workspace import check_target

    target, runtimes = out or default_out(model, recipe), targets.split(",") if targets else ()
    if dry_run:
        _foretell(model, recipe, runtimes, output)
        return
    check_target(target, overwrite)
    with (
        watching(output.console, target.parent / f"{target.name}.log") as observer,
        decided(model, target, recipe, device, observer) as final,
    ):
        print_plan(output.console, plan(model, final, runtimes))
        report = run_recipe(
            model, target, final, overwrite=overwrite, device=device, targets=runtimes, observer=observer
        )
    print_report(output.console, report)
    output.result(report.as_dict() | evaluated(report.out, model, evaluate_on, device, output))
    if report.verdict.word == "BROKEN":
        raise typer.Exit(BROKEN)


def carry_chain(
    model: str,
    out: Path | None,
    wanted: "Chain",
    overwrite: bool,
    dry_run: bool,
    evaluate_on: str | None,
    device: str,
    output: Output,
) -> None:
    from ...calibrate.source import open_source
    from ...eval.render import table
    from ...recipes import chain
    from ..report.console import size, watching

    target = out or chain.default_out(model, wanted)
    names = wanted.names(Path(model).name)
    if dry_run:
        before = open_source(model).nbytes
        for number, (stage, name) in enumerate(zip(wanted.stages, names, strict=True), start=1):
            output.console.print(f"stage {number}: {chain.kind_of(stage)} -> {name}", highlight=False)
        output.result({"bytes_before": before, **wanted.as_dict()})
        return
    with watching(output.console, target.parent / f"{target.name}.log") as observer:
        report = chain.run(
            model, target, wanted, overwrite=overwrite, device=device, evaluate_on=evaluate_on, observer=observer
        )
    for number, record in enumerate(report.stages, start=1):
        output.console.print(f"stage {number}: {record['stage']}, {size(record['bytes'])}", highlight=False)
    share = report.bytes_after / report.bytes_before
    output.console.print(
        f"{size(report.bytes_before)} -> {size(report.bytes_after)} ({share:.1%}), {report.seconds:.1f} s\n"
        f"written to {report.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if report.evaluation is not None:
        output.console.print(f"evaluated: {report.evaluated}", highlight=False, markup=False, soft_wrap=True)
        output.console.print(table({str(report.evaluated): report.evaluation}))
    output.result(report.as_dict())
    if any(record.get("verdict") == "BROKEN" for record in report.stages):
        raise typer.Exit(BROKEN)


def _foretell(model: str, recipe: "Recipe", runtimes: Sequence[str], output: Output) -> None:
    """The plan with its exact sizes or, where layers share a budget, with the most that they may take."""
    from ...recipes.allocation import most_bytes, uniform
    from ..pipeline import plan
    from ..report.console import print_plan, size

    planned = plan(model, uniform(recipe), runtimes)
    sizes: dict[str, Any] = {"bytes_before": planned.bytes_before, "notes": planned.notes}
    if recipe.allocate is None:
        print_plan(output.console, planned)
        output.result(sizes | {"bytes_after": planned.bytes_after})
        return
    most = most_bytes(planned, recipe)
    output.console.print(
        f"{len(planned.quantized)} layers in {planned.blocks} blocks share a budget and take {size(most)} at most; "
        "which of them gets what is measured when the recipe is carried out",
        highlight=False,
    )
    output.result(sizes | {"layer_bytes_at_most": most})


def evaluated(made: Path, model: str, data: str | None, device: str, output: Output) -> dict[str, Any]:
    """The evaluation of the checkpoint `made` against `model`, shown and for JSON; empty where no `data` were named."""
    if data is None:
        return {}
    from ...eval.perplexity import evaluate
    from ...eval.render import table
    from ..report.console import watching

    with watching(output.console) as observer:
        found = evaluate(made, data, against=model, device=device, progress=observer)
    output.console.print(table({made.name: found}))
    return {"evaluation": found.as_dict()}

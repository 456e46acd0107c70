"""Carry out a recipe for a command: plan, run, report, evaluate."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .session import Output

if TYPE_CHECKING:
    from ...recipes.chain import Chain
    from ...recipes.schema import Recipe

BROKEN = 3
Evaluate = Callable[[Path], dict[str, Any]]  # shows the evaluation of a checkpoint; its figures for JSON


def run_recipe(
    model: str,
    out: Path | None,
    recipe: "Recipe",
    overwrite: bool,
    dry_run: bool,
    evaluate: Evaluate | None,
    device: str,
    output: Output,
    targets: str = "",
) -> None:
    from ...recipes.naming import default_out
    from ..allocation.allocate import decided
    from ..pipeline import plan
    from ..pipeline import run as run_recipe
    from ..workspace import check_target
    from .console import print_plan, print_report, watching

    target, runtimes = out or default_out(model, recipe), targets.split(",") if targets else ()
    if dry_run:
        preview(model, recipe, runtimes, output)
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
    output.result(report.as_dict() | ({"evaluation": evaluate(report.out)} if evaluate else {}))
    if report.verdict.word == "BROKEN":
        raise typer.Exit(BROKEN)


def carry_chain(
    model: str,
    out: Path | None,
    wanted: "Chain",
    overwrite: bool,
    dry_run: bool,
    evaluate: Evaluate | None,
    device: str,
    output: Output,
) -> None:
    from ...recipes import chain
    from ..chain import run as run_chain
    from ..formats.source import open_source
    from .console import size, watching

    target = out or chain.default_out(model, wanted)
    names = wanted.names(Path(model).name)
    if dry_run:
        before = open_source(model).nbytes
        for number, (stage, name) in enumerate(zip(wanted.stages, names, strict=True), start=1):
            output.console.print(f"stage {number}: {chain.kind_of(stage)} -> {name}", highlight=False)
        output.result({"bytes_before": before, **wanted.as_dict()})
        return
    with watching(output.console, target.parent / f"{target.name}.log") as observer:
        report = run_chain(
            model, target, wanted, overwrite=overwrite, device=device, evaluate=evaluate, observer=observer
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
    output.result(report.as_dict())
    if any(record.get("verdict") == "BROKEN" for record in report.stages):
        raise typer.Exit(BROKEN)


def preview(model: str, recipe: "Recipe", runtimes: Sequence[str], output: Output) -> None:
    """The plan with its exact sizes or, where layers share a budget, with the most that they may take."""
    from ..allocation.allocate import most_bytes, uniform
    from ..pipeline import plan
    from .console import print_plan, size

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

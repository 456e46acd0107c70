"""The command `compress`: parse, call the Python API, print. Data go to stdout, everything else to stderr."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .compress.command.flags import (
    Model,
    ResultFlags,
    RunFlags,
    Session,
    ThreadedSession,
    command,
    refuse_with_recipe,
)
from .compress.command.run import run_chain, run_recipe
from .eval import commands
from .eval.commands import evaluator
from .recipes.options.distill import DistillOptions
from .recipes.options.prune import PruneOptions
from .recipes.options.quantize import QuantizeOptions

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a language model smaller and faster, and measure what that costs in accuracy.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that are shipped with lmpress.")


@command(app, resumes=True)
def quantize(
    model: Model,
    options: QuantizeOptions,
    *,
    recipe: Annotated[str | None, typer.Option(help="Recipe file or name, instead of the flags above.")] = None,
    flags: RunFlags,
    output: ThreadedSession,
) -> None:
    """Quantize the weights of MODEL and write a packed checkpoint.

    compress quantize --method gptq --bits 4 MODEL
    """
    from .recipes import schema

    if recipe is not None:
        refuse_with_recipe(options)
    wanted = options.recipe() if recipe is None else schema.read(recipe)
    run_recipe(model, wanted, flags, evaluator(model, flags.evaluate_on, flags.device, output), output)


@command(app, resumes=True)
def prune(model: Model, options: PruneOptions, flags: RunFlags, output: ThreadedSession) -> None:
    """Prune the weights of MODEL.

    compress prune --method exactobs --pattern 2:4 MODEL
    """
    evaluate = evaluator(model, flags.evaluate_on, flags.device, output)
    run_recipe(model, options.recipe(), flags, evaluate, output)


@command(app, resumes=True)
def distill(model: Model, options: DistillOptions, flags: ResultFlags, output: ThreadedSession) -> None:
    """Remove layers and channels of MODEL, then recover accuracy by distillation.

    compress distill --drop 4 MODEL
    """
    from accelerate import PartialState

    from .compress import api
    from .compress.command.console import print_distilled, watching

    with watching(output.console) as observer:
        report = api.distill(
            model, flags.out, options=options, overwrite=flags.overwrite, device=flags.device, observer=observer
        )
    if not PartialState().is_main_process:  # of several processes, one prints
        return
    print_distilled(output.console, report)
    evaluate = evaluator(options.teacher or model, flags.evaluate_on, flags.device, output)
    output.result(report.as_dict() | ({"evaluation": evaluate(report.out)} if evaluate else {}))


@command(app, resumes=True)
def run(
    model: Model,
    recipe: Annotated[str, typer.Option(help="Recipe file or name (see: compress recipes list).")],
    flags: RunFlags,
    output: ThreadedSession,
) -> None:
    """Run the passes of a recipe on MODEL, or the stages of a chain."""
    from .recipes import chain

    wanted, evaluate = chain.read(recipe), evaluator(model, flags.evaluate_on, flags.device, output)
    if isinstance(wanted, chain.Chain):
        run_chain(model, wanted, flags, evaluate, output)
    else:
        run_recipe(model, wanted, flags, evaluate, output)


@command(app)
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory: ours, GPTQ, AWQ or compressed-tensors.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")],
    format_name: Annotated[str, typer.Option("--format", help="For example gptq, awq, gguf, onnx or fp16.")],
    output: Session,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write CHECKPOINT in the format of another runtime, with its codes and scales unchanged."""
    from .compress.command.console import print_export
    from .compress.export import export as write

    report = write(checkpoint, out, format=format_name, overwrite=overwrite)
    print_export(output.console, report)
    output.result(report.as_dict())


commands.add_to(app)
app.add_typer(recipes_app, name="recipes")


@command(recipes_app, "list")
def list_recipes(output: Session) -> None:
    """List the shipped recipes, each with its purpose."""
    from .recipes.schema import shipped

    purposes = {name: text.splitlines()[0].removeprefix("# ") for name, text in shipped().items()}
    table = Table("recipe", "for")
    for name, purpose in purposes.items():
        table.add_row(name, Text(purpose))
    output.result(purposes, table)


@command(recipes_app, "show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a file.")], output: Session
) -> None:
    """Print a recipe with every option written out."""
    from .recipes import chain, schema

    found = chain.read(name)
    if isinstance(found, chain.Chain):
        output.result(found.as_dict(), Text(chain.dump(found).rstrip()))
    else:
        output.result(found.model_dump(mode="json"), Text(schema.dump(found).rstrip()))


if __name__ == "__main__":
    sys.exit(app())

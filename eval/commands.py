"""The commands that examine a model and change nothing: eval, verify, inspect, bench."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group

from ..compress.command.flags import Model, OneThreadSession, Session, ThreadedSession, command
from ..compress.command.session import Output
from ..recipes.options.evaluate import BenchOptions, EvaluateOptions


def add_to(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    command(app, "eval")(evaluate)
    for function in (verify, inspect, bench):
        command(app)(function)


def evaluate(
    model: Model,
    *,
    data: Annotated[
        str, typer.Option(help="Text: a .txt, .jsonl or .parquet file, python-stdlib, or a Hugging Face Hub data set.")
    ] = "python-stdlib",
    against: Annotated[
        str | None,
        typer.Option(help="Base model: adds the KL divergence and the agreement with it.", show_default=False),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also tokens per second, with those of --against, and peak memory.")
    ] = False,
    options: EvaluateOptions,
    output: ThreadedSession,
) -> None:
    """Measure the perplexity of MODEL, and its divergence from a base model."""
    from ..compress.command.console import watching
    from .perplexity import DTYPES
    from .perplexity import evaluate as measure
    from .tables import speeds, table
    from .timing.speed import speed as time_models

    with watching(output.console) as observer:
        found = measure(model, data, against=against, options=options, progress=observer)
        device, dtype, kernel = options.device, DTYPES[options.dtype], options.kernel
        timed = (
            time_models(model, against=against, device=device, dtype=dtype, kernel=kernel, progress=observer)
            if speed
            else []
        )
    content = found.as_dict() | ({"speed": [each.as_dict() for each in timed]} if speed else {})
    output.result(content, Group(table({Path(model).name: found}), *([speeds(timed)] if speed else [])))


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory to load in other runtimes.")],
    output: Session,
    runtime: Annotated[str, typer.Option(help="Runtimes, separated by commas.")] = "transformers",
    against: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint that it was exported from; or a dense model, to measure the difference. Default: itself.",
            show_default=False,
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(help="Interpreter that has the runtimes. Default: this one.", show_default=False),
    ] = None,
) -> None:
    """Prove that other runtimes serve CHECKPOINT as intended, or name the tensor and block at fault."""
    from .tables import verification
    from .verify import verify as prove

    found = prove(checkpoint, against=against, runtime=runtime.split(","), python=python)
    output.result(found.as_dict(), verification(found))
    if not found.ok:
        raise typer.Exit(1)


def inspect(
    model: Model,
    output: Session,
    kernel: Annotated[
        str | None, typer.Option(help="Force a kernel on packed layers by its name.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Show what MODEL consists of: blocks, linear layers, how they are stored and served. Loads no weights."""
    from dataclasses import asdict

    from .dispatch_report import served
    from .inspect import inspect as examine
    from .tables import inspection

    found = examine(model)
    kernels = served(model, kernel=kernel, device=device) if found.quantization else []
    output.result(found.as_dict() | {"kernels": [asdict(each) for each in kernels]}, inspection(found, kernels))


def bench(options: BenchOptions, output: OneThreadSession) -> None:
    """Time the kernels on this CPU, or a GPU, against torch and other libraries."""
    from ..compress.command.console import watching
    from .tables import timings
    from .timing.bench import bench as time_all

    with watching(output.console) as observer:
        found = time_all(
            options.shapes,
            options.rows,
            rounds=options.rounds,
            only=options.only,
            device=options.device,
            tune=options.tune,
            progress=observer,
        )
    if options.plot is not None:
        from .timing.plot import save

        save(found, options.plot)
    output.result(found.as_dict(), timings(found))


def evaluator(model: str, data: str | None, device: str, output: Output) -> Callable[[Path], dict[str, Any]] | None:
    """A function that evaluates a checkpoint against `model` on `data`, prints the result and returns it for JSON.

    None if there is no `data`. Runs get it as an argument, because `compress` must not import `eval`.
    """
    return None if data is None else lambda made: _evaluated(made, model, data, device, output)


def _evaluated(made: Path, model: str, data: str, device: str, output: Output) -> dict[str, Any]:
    from ..compress.command.console import watching
    from .perplexity import evaluate
    from .tables import table

    with watching(output.console) as observer:
        found = evaluate(made, data, against=model, device=device, progress=observer)
    output.console.print(table({made.name: found}))
    return found.as_dict()

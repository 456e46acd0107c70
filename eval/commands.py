"""The commands that look at a model and change none: eval, verify, inspect, bench."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group

from ..compress.command.flags import Debug, Device, Json, KernelName, Model, Quiet, Threads, parse_numbers
from ..compress.command.session import Output, session


def evaluate(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Text: a .txt, .jsonl or .parquet file, python-stdlib, or a hub data set.")
    ] = "python-stdlib",
    against: Annotated[
        str | None,
        typer.Option(help="Base model: adds the KL divergence and the agreement with it.", show_default=False),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a row. Default: the context, at most 2048.", show_default=False)
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Default: the row length.", show_default=False)] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="First rows only.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    kernel: KernelName = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Tokens per second too, beside those of --against, and peak memory.")
    ] = False,
    kv_bits: Annotated[
        int | None,
        typer.Option(help="Pack the keys and values of past tokens: 2 to 8; 16: never.", show_default=False),
    ] = None,
    kv_window: Annotated[
        int | None, typer.Option(min=0, help="Latest tokens that are not packed. Default: 64", show_default=False)
    ] = None,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Measure the perplexity of MODEL, and its divergence from a base model."""
    with session(json_file, quiet, debug, threads) as output:
        from ..compress.command.console import watching
        from .perplexity import DTYPES
        from .perplexity import evaluate as measure
        from .tables import speeds, table

        with watching(output.console) as observer:
            found = measure(
                model,
                data,
                seq_len=seq_len,
                stride=stride,
                rows=rows,
                against=against,
                device=device,
                dtype=dtype,
                kernel=kernel,
                kv_bits=kv_bits,
                kv_window=kv_window,
                progress=observer,
            )
            timed = []
            if speed:
                from .timing.speed import speed as time_models

                options = {"device": device, "dtype": DTYPES[dtype], "kernel": kernel, "progress": observer}
                timed = time_models(model, against=against, **options)
        content = found.as_dict() | ({"speed": [each.as_dict() for each in timed]} if speed else {})
        output.result(content, Group(table({Path(model).name: found}), *([speeds(timed)] if speed else [])))


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory to load elsewhere.")],
    runtime: Annotated[str, typer.Option(help="Runtimes, separated by commas.")] = "transformers",
    against: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint it was exported from; a dense model: how far from it. Default: itself.", show_default=False
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(help="Interpreter that has the runtimes. Default: this one.", show_default=False),
    ] = None,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove that other runtimes serve CHECKPOINT as it was meant, or name the tensor and block at fault."""
    with session(json_file, quiet, debug) as output:
        from .tables import verification
        from .verify import verify as prove

        found = prove(checkpoint, against=against, runtime=runtime.split(","), python=python)
        output.result(found.as_dict(), verification(found))
    if not found.ok:
        raise typer.Exit(1)


def inspect(
    model: Model,
    kernel: KernelName = None,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
    device: Device = "cpu",
) -> None:
    """Show what MODEL is made of: blocks, linear layers, how they are stored and served. Loads no weights."""
    with session(json_file, quiet, debug) as output:
        from dataclasses import asdict

        from .dispatch_report import served
        from .inspect import inspect as look
        from .tables import inspection

        found = look(model)
        kernels = served(model, kernel=kernel, device=device) if found.quantization else []
        output.result(found.as_dict() | {"kernels": [asdict(each) for each in kernels]}, inspection(found, kernels))


def bench(
    shapes: Annotated[str, typer.Option(help="Weights to multiply by, OUTxIN.")] = "4096x4096,11008x4096",
    rows: Annotated[str, typer.Option(help="Numbers of input rows.")] = "1,8,64,512",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each product is taken; medians count.")] = 15,
    only: Annotated[str, typer.Option(help="Regular expression: the products to time.", show_default=False)] = "",
    plot: Annotated[
        Path | None, typer.Option(help="Draw the ratios into a file: .svg, .png, .pdf.", show_default=False)
    ] = None,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
    threads: Threads = 1,
    device: Device = "cpu",
    tune: Annotated[
        bool, typer.Option("--tune", help="Search the fastest tiles on this GPU first, and keep them.")
    ] = False,
) -> None:
    """Time the kernels on this CPU, or a GPU, against torch and other libraries."""
    with session(json_file, quiet, debug, threads) as output:
        from ..compress.command.console import watching
        from .tables import timings
        from .timing.bench import bench as time_all

        numbers = parse_numbers(rows, "--rows")
        with watching(output.console) as observer:
            found = time_all(
                shapes.split(","), numbers, rounds=rounds, only=only, device=device, tune=tune, progress=observer
            )
        if plot is not None:
            from .timing.plot import save

            save(found, plot)
        output.result(found.as_dict(), timings(found))


def evaluator(model: str, data: str | None, device: str, output: Output) -> Callable[[Path], dict[str, Any]] | None:
    """What evaluates a checkpoint against `model` on `data`, shows that, and gives it for JSON; None without `data`."""
    return None if data is None else lambda made: _evaluated(made, model, data, device, output)


def _evaluated(made: Path, model: str, data: str, device: str, output: Output) -> dict[str, Any]:
    from ..compress.command.console import watching
    from .perplexity import evaluate
    from .tables import table

    with watching(output.console) as observer:
        found = evaluate(made, data, against=model, device=device, progress=observer)
    output.console.print(table({made.name: found}))
    return found.as_dict()

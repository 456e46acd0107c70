"""The command `compress`: parse, call the API, render. Data go to stdout, everything else to stderr."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .compress.command.flags import (
    Calib,
    Debug,
    Device,
    DryRun,
    Eval,
    Json,
    Keep,
    Model,
    Out,
    Overwrite,
    Quiet,
    Samples,
    Seed,
    SeqLen,
    Target,
    Threads,
    parse_numbers,
    parse_options,
)
from .compress.command.run import carry_chain, run_recipe
from .compress.command.session import session
from .eval import commands as look
from .eval.commands import evaluator
from .recipes.methods import Family, method_names

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a language model smaller and faster, and know what it cost.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that come with lmpress.")
app.add_typer(recipes_app, name="recipes")


@app.command()
def quantize(
    model: Model,
    out: Out = None,
    method: Annotated[
        str, typer.Option(help=f"{', '.join(method_names(Family.QUANTIZE, Family.TRANSFORM))}.")
    ] = "gptq",
    bits: Annotated[int | None, typer.Option(help="Bits a weight, 2 to 8. Default: the method's, mostly 4.")] = None,
    average_bits: Annotated[
        float | None,
        typer.Option(
            help="Bits a weight on disk instead, on average: each layer gets what serves it.", show_default=False
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale; -1: an output row. Default: the method's, mostly 128."),
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point too (always with awq).")] = False,
    quality: Annotated[
        str,
        typer.Option(help="fast (as published), balanced (the best the solver alone can do), best (block tuning too)."),
    ] = "balanced",
    calib: Calib = "python-stdlib",
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    keep: Keep = [],  # noqa: B006
    options: Annotated[
        list[str], typer.Option("--set", help="Option of the method, NAME=VALUE (repeatable): --set observer=mse")
    ] = [],  # noqa: B006
    recipe: Annotated[str | None, typer.Option(help="Recipe file or name, instead of the flags above.")] = None,
    evaluate_on: Eval = None,
    seed: Seed = 0,
    target: Target = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Quantize the weights of MODEL and write a packed checkpoint.

    compress quantize --method gptq --bits 4 MODEL
    """
    with session(json_file, quiet, debug, threads) as output:
        from .recipes import schema
        from .recipes.options import quantization_recipe

        wanted = (
            schema.read(recipe)
            if recipe
            else quantization_recipe(
                method=method,
                bits=bits,
                average_bits=average_bits,
                group_size=group_size,
                symmetric=False if asymmetric else None,
                quality=quality,
                calib=calib,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                keep=keep,
                options=parse_options(options),
            )
        )
        evaluate = evaluator(model, evaluate_on, device, output)
        run_recipe(model, out, wanted, overwrite, dry_run, evaluate, device, output, target)


@app.command()
def prune(
    model: Model,
    out: Out = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(method_names(Family.PRUNE))}.")] = "exactobs",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the weights that goes. Default: 0.5", show_default=False)
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="Zeros in every group of columns instead: 2:4, 4:8; or blocks: 1x4.", show_default=False),
    ] = None,
    allocate: Annotated[
        bool, typer.Option("--allocate", help="Share the sparsity between layers as each bears it.")
    ] = False,
    format_: Annotated[
        str,
        typer.Option("--format", help="dense (loads anywhere, no smaller), bitmask or 2:4 (smaller, lmpress.load)."),
    ] = "dense",
    calib: Calib = "python-stdlib",
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    keep: Keep = [],  # noqa: B006
    options: Annotated[
        list[str], typer.Option("--set", help="Option of the method, NAME=VALUE (repeatable): --set refit=true")
    ] = [],  # noqa: B006
    evaluate_on: Eval = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Prune the weights of MODEL.

    compress prune --method exactobs --pattern 2:4 MODEL
    """
    with session(json_file, quiet, debug, threads) as output:
        from .recipes.options import pruning_recipe

        wanted = pruning_recipe(
            method=method,
            sparsity=sparsity,
            pattern=pattern,
            allocate=allocate,
            format=format_,
            calib=calib,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            keep=keep,
            options=parse_options(options),
        )
        evaluate = evaluator(model, evaluate_on, device, output)
        run_recipe(model, out, wanted, overwrite, dry_run, evaluate, device, output)


@app.command()
def distill(
    model: Model,
    out: Out = None,
    keep_layers: Annotated[int | None, typer.Option(help="How many layers stay.", show_default=False)] = None,
    drop: Annotated[
        float | None, typer.Option(help="How many layers go; below 1: which share of them.", show_default=False)
    ] = None,
    layers: Annotated[str | None, typer.Option(help="The layers that stay: 0,2,3,5", show_default=False)] = None,
    choice: Annotated[
        str, typer.Option(help="How layers are chosen: greedy, influence, angular, spread, first or last.")
    ] = "greedy",
    mlp_width: Annotated[
        float | None,
        typer.Option(help="Inner channels that each MLP keeps; below 1: a share of them.", show_default=False),
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key-value heads that stay, with their queries.", show_default=False)
    ] = None,
    hidden_size: Annotated[
        float | None,
        typer.Option(help="Channels of the residual stream that stay; below 1: a share of them.", show_default=False),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model to learn from. Default: MODEL as it was.", show_default=False)
    ] = None,
    data: Annotated[
        str, typer.Option(help="Text to learn on: a .txt, .jsonl or .parquet file, python-stdlib, or a hub data set.")
    ] = "python-stdlib",
    samples: Annotated[int, typer.Option(min=2, help="Rows of text.")] = 4096,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a row, the context at most.")] = 512,
    steps: Annotated[int, typer.Option(min=0, help="Updates; 0: no training.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Rows an update.")] = 16,
    rate: Annotated[float, typer.Option(help="Learning rate at its height.")] = 5e-4,
    lora: Annotated[int, typer.Option(min=0, help="Rank of adapters to train instead of all weights; 0: none.")] = 0,
    checks: Annotated[int, typer.Option(min=1, help="How often the state is saved and held-out text looked at.")] = 10,
    options: Annotated[
        list[str], typer.Option("--set", help="Option of the training, NAME=VALUE (repeatable): --set hidden=1")
    ] = [],  # noqa: B006
    evaluate_on: Eval = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Leave layers and channels of MODEL out, and teach what is left to predict as before.

    compress distill --drop 4 MODEL
    """
    with session(json_file, quiet, debug, threads) as output:
        from accelerate import PartialState

        from .compress import api
        from .compress.command.console import print_distilled, watching

        lessons = {"steps": steps, "batch": batch, "rate": rate, "lora": lora, "checks": checks, "seed": seed}
        with watching(output.console) as observer:
            report = api.distill(
                model,
                out,
                layers=None if layers is None else parse_numbers(layers, "--layers", least=0),
                keep_layers=keep_layers,
                drop=drop,
                choice=choice,
                mlp_width=mlp_width,
                kv_heads=kv_heads,
                hidden_size=hidden_size,
                teacher=teacher,
                data=data,
                samples=samples,
                seq_len=seq_len,
                options=lessons | parse_options(options),
                overwrite=overwrite,
                device=device,
                observer=observer,
            )
        if not PartialState().is_main_process:  # of several, one speaks
            return
        print_distilled(output.console, report)
        evaluate = evaluator(teacher or model, evaluate_on, device, output)
        output.result(report.as_dict() | ({"evaluation": evaluate(report.out)} if evaluate else {}))


@app.command()
def run(
    model: Model,
    recipe: Annotated[str, typer.Option(help="Recipe file or name (see: compress recipes list).")],
    out: Out = None,
    evaluate_on: Eval = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Carry out the passes of a recipe on MODEL, or the stages of a chain."""
    with session(json_file, quiet, debug, threads) as output:
        from .recipes import chain

        wanted, evaluate = chain.read(recipe), evaluator(model, evaluate_on, device, output)
        if isinstance(wanted, chain.Chain):
            carry_chain(model, out, wanted, overwrite, dry_run, evaluate, device, output)
        else:
            run_recipe(model, out, wanted, overwrite, dry_run, evaluate, device, output)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory: ours, or GPTQ, AWQ, compressed-tensors.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write.")],
    format_name: Annotated[str, typer.Option("--format", help="Such as gptq, awq, gguf, onnx, fp16.")],
    overwrite: Overwrite = False,
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write CHECKPOINT in another runtime's format, codes and scales as they are."""
    with session(json_file, quiet, debug) as output:
        from .compress.command.console import print_export
        from .compress.export import export as write

        report = write(checkpoint, out, format=format_name, overwrite=overwrite)
        print_export(output.console, report)
        output.result(report.as_dict())


app.command(name="eval")(look.evaluate)
app.command()(look.verify)
app.command()(look.inspect)
app.command()(look.bench)


@recipes_app.command("list")
def list_recipes(json_file: Json = None, quiet: Quiet = False, debug: Debug = False) -> None:
    """Name the shipped recipes with what each is for."""
    with session(json_file, quiet, debug) as output:
        from .recipes.schema import shipped

        purposes = {name: text.splitlines()[0].removeprefix("# ") for name, text in shipped().items()}
        table = Table("recipe", "for")
        for name, purpose in purposes.items():
            table.add_row(name, Text(purpose))
        output.result(purposes, table)


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a file.")],
    json_file: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print a recipe with every option written out."""
    with session(json_file, quiet, debug) as output:
        from .recipes import chain, schema

        found = chain.read(name)
        if isinstance(found, chain.Chain):
            output.result(found.as_dict(), Text(chain.dump(found).rstrip()))
        else:
            output.result(found.model_dump(mode="json"), Text(schema.dump(found).rstrip()))


if __name__ == "__main__":
    sys.exit(app())

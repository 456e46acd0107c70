"""The flags that several commands share, each written once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError

Model = Annotated[
    str, typer.Argument(help="Model directory (config.json and safetensors), or org/name of a hub model.")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Directory to write. Default: beside the model.", show_default=False)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output, and discard an unfinished run of it.")
]
Target = Annotated[
    str, typer.Option("--target", help="Runtimes that must be able to serve it: vllm,llamacpp.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan with its exact sizes, and stop.")]
Calib = Annotated[
    str, typer.Option(help="Calibration text: a .txt, .jsonl or .parquet file, python-stdlib, or a hub data set.")
]
Eval = Annotated[
    str | None,
    typer.Option("--eval", help="Evaluate the result against the original on this data.", show_default=False),
]
Json = Annotated[str | None, typer.Option("--json", help="Write the result as JSON to a file, or - for stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration rows.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens a row.")]
Keep = Annotated[list[str], typer.Option(help="Pattern of layers that stay dense (repeatable).")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of calibration rows.")]


def parse_options(given: list[str]) -> dict[str, Any]:
    """Turn NAME=VALUE pairs into values by YAML's rules."""
    import yaml

    options = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {pair!r} is no NAME=VALUE", "write for example --set observer=mse")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--set {pair!r} holds no value that YAML knows", "write a number or a word") from None
    return options


def parse_layers(given: str | None) -> list[int] | None:
    """Turn `0,2,3` into numbers. Raises `UsageError`."""
    if given is None:
        return None
    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise UsageError(f"--layers {given!r} is no list of numbers", "write for example --layers 0,2,3") from None

"""The flags that several commands share, each written once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import UsageError

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
KernelName = Annotated[
    str | None, typer.Option("--kernel", help="Force a kernel on packed layers by its name.", show_default=False)
]
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


def parse_numbers(given: str, flag: str, least: int = 1) -> list[int]:
    """Whole numbers from `least` on, separated by commas. Raises `UsageError`."""
    words = [word.strip() for word in given.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise UsageError(
            f"{flag} {given!r} holds something else than numbers from {least} on", "write for example 1,8,64"
        )
    return [int(word) for word in words]

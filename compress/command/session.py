"""Everything between a command's words and its exit code: where words and data go, threads, errors as one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from ...errors import CompressError

INTERRUPTED = 130


@dataclass(frozen=True)
class Output:
    """Where a command's words and its data go."""

    console: Console
    json: str | None
    data: Console = field(default_factory=lambda: Console(soft_wrap=True))

    def result(self, content: dict[str, Any], shown: object = None) -> None:
        """Print `shown`, and write `content` where JSON was asked for."""
        if shown is not None and self.json != "-" and not self.console.quiet:
            self.data.print(shown)
        if self.json is None:
            return
        text = json.dumps(content, indent=2)
        if self.json == "-":
            print(text)
        else:
            from ...calibrate.model.safetensors_io import storage_errors

            with storage_errors(Path(self.json)):
                Path(self.json).write_text(text + "\n", encoding="utf-8")


@contextmanager
def session(json_file: str | None, quiet: bool, debug: bool, threads: int | None = None) -> Iterator[Output]:
    """Everything between a command's words and its exit code: consoles, threads, errors as one line."""
    console = Console(stderr=True, quiet=quiet)
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        yield Output(console, json_file)
    except CompressError as error:
        if debug:
            raise
        _say(error.message, error.hint)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if debug:
            raise
        _say("interrupted", "the same command goes on where it stopped")
        raise typer.Exit(INTERRUPTED) from None
    except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        if debug or isinstance(error, typer.Exit):
            raise
        reason = " ".join(str(error).split())[:300]
        _say(f"unexpected {type(error).__name__}: {reason}", "repeat it with --debug and report it")
        raise typer.Exit(1) from None


def _say(message: str, hint: str | None) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message), highlight=False)
    if hint:
        console.print(Text.assemble(("hint: ", "cyan"), hint), highlight=False)

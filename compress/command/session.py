"""The frame of every command: consoles for messages and data, threads, and errors as one line with an exit code."""

import json
import signal
import threading
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
    """Where a command's messages and its data go."""

    console: Console
    json: str | None
    data: Console = field(default_factory=lambda: Console(soft_wrap=True))

    def result(self, content: dict[str, Any], shown: object = None) -> None:
        """Print `shown`, and write `content` as JSON if `--json` was given."""
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
def session(
    json_file: str | None, quiet: bool, debug: bool, threads: int | None = None, resumes: bool = False
) -> Iterator[Output]:
    """Consoles and threads for a command, and its errors as one line with the exit code.

    `resumes`: the same command continues an interrupted run. With `debug` errors are raised with their traceback.
    """
    console = Console(stderr=True, quiet=quiet)
    try:
        with _terminable():
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            yield Output(console, json_file)
    except CompressError as error:
        if debug:
            raise
        _print_error(error.message, error.hint)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if debug:
            raise
        _print_error("interrupted", "the same command continues from the last finished step" if resumes else None)
        raise typer.Exit(INTERRUPTED) from None
    except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        if debug or isinstance(error, typer.Exit):
            raise
        reason = " ".join(str(error).split())[:300]
        _print_error(
            f"unexpected {type(error).__name__}: {reason}", "run it again with --debug, and report the traceback"
        )
        raise typer.Exit(1) from None


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the command as SIGINT does: what is finished is kept, and what is temporary is removed."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set signal handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _print_error(message: str, hint: str | None) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message), highlight=False)
    if hint:
        console.print(Text.assemble(("hint: ", "cyan"), hint), highlight=False)

"""What can go wrong, said once.

    CompressError            the run failed: one line, exit code 1
    ├── UsageError           the request itself cannot be carried out: one line, exit code 2
    └── StorageError         the disk refused: what is finished is kept, the same command goes on

Raised where the cause is known, with the thing's name and the remedy; `cli.py` renders it, nobody else catches it.
"""


class CompressError(Exception):
    """A failure that names its cause; `hint` says what the user can do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.message = message
        self.hint = hint


class UsageError(CompressError):
    """A wrong flag, value or path: nothing was started."""

    exit_code = 2


class StorageError(CompressError):
    """Writing failed for a reason outside the run (disk full, no permission)."""

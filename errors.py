"""Exception hierarchy.

    CompressError            the run failed: one line, exit code 1
    ├── UsageError           the request itself is wrong or impossible: one line, exit code 2
    └── StorageError         writing failed: what is finished is kept, the same command resumes

An error is raised where its cause is known, with the name of the file or option at fault and the remedy; the command line
prints it.
"""


class CompressError(Exception):
    """A failure with its cause in `message`; `hint` is what the user can do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.message = message
        self.hint = hint


class UsageError(CompressError):
    """A wrong flag, value or path: nothing was started."""

    exit_code = 2


class StorageError(CompressError):
    """Writing failed for a reason outside the run (disk full, no permission, a defective disk)."""

"""The log file of a run, one line per event. Its failures never end the run: they are reported once."""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ...calibrate.model.safetensors_io import storage_errors
from ...errors import UsageError


class LogFile(logging.StreamHandler[TextIO]):
    """Writes lines to `stream` until one fails; `warn` gets the reason."""

    def __init__(self, stream: TextIO, warn: Callable[[str], None]) -> None:
        super().__init__(stream)
        self._warn, self._failed = warn, False
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if self._failed:
            return
        try:
            self.stream.write(self.format(record) + self.terminator)
            self.flush()
        except OSError as error:
            self._failed = True
            self._warn(f"the log {self.stream.name} could not be written ({error.strerror}): it ends here")

    def close(self) -> None:
        """Close the file; what could not be written is lost."""
        with suppress(OSError):
            self.stream.close()
        super().close()


@contextmanager
def log_to(file: Path | None, warn: Callable[[str], None]) -> Iterator[logging.Logger]:
    """A logger that appends to `file`, or writes nothing if that is None.

    Raises `StorageError` if the file cannot be opened, and `UsageError` if it is not a regular file (or is a symbolic link).
    """
    logger = logging.getLogger("lmpress.run")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.NullHandler() if file is None else LogFile(_open(file), warn)
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        handler.close()


def _open(file: Path) -> TextIO:
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
            raise UsageError(f"the log {file} is not a regular file", "remove it, or choose another -o")
        return open(file, "a", encoding="utf-8", opener=_append)


def _append(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)

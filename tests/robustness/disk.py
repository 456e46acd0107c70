"""A disk that dies: counts what this process does to the files below a folder, and ends or fails it at the n-th operation.

Python's own ways to the disk are replaced (`open`, `os.rename`, `os.fsync`, ...); a file opened for writing has a raw layer
that counts every write that leaves the buffer. What libraries write by other ways is not seen.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KILL, EIO, ENOSPC = "kill", "eio", "enospc"
FILLS = {"open", "write", "mkdir", "fsync"}  # what a full disk refuses; the other operations free space, or need none
ONE_PATH = ("mkdir", "rmdir", "unlink", "remove", "truncate")
TWO_PATHS = ("rename", "replace", "link", "symlink")
DESCRIPTORS = ("fsync", "fdatasync", "ftruncate", "sendfile", "write", "pwrite", "copy_file_range", "posix_fallocate")


@dataclass
class Disk:
    """Everything below `root`; `mode` is what happens at operation number `at`, counted from 0; with -1 nothing does.

    kill    the process is gone before the operation, a write is half done
    eio     this operation fails, later ones work again
    enospc  from then on everything fails that needs space
    """

    root: Path
    mode: str = KILL
    at: int = -1
    operations: list[tuple[str, str]] = field(default_factory=list)

    def step(self, kind: str, path: Path, torn: Callable[[], object] | None = None) -> None:
        """Count an operation, and let it fail if it is its turn; `torn` does half of it."""
        number = len(self.operations)
        self.operations.append((kind, str(path.relative_to(self.root))))
        if self.at < 0 or number < self.at:
            return
        if number == self.at and self.mode == KILL:
            if torn is not None:
                torn()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.at and self.mode == EIO:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        if self.mode == ENOSPC and kind in FILLS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def inside(self, path: Any, folder: int | None = None) -> Path | None:
        """The full path if it lies below the root; `path` may be relative to an open folder, or a descriptor."""
        if isinstance(path, int):
            found = Path(f"/proc/self/fd/{path}").readlink()
        else:
            start = Path.cwd() if folder is None else Path(f"/proc/self/fd/{folder}").readlink()
            found = start / os.fsdecode(path)
        found = Path(os.path.normpath(found))
        return found if found.is_relative_to(self.root) else None


def install(disk: Disk) -> None:
    """Replace this process's ways to the disk. It cannot be undone: call it in a child."""
    for name in (*ONE_PATH, *TWO_PATHS):
        setattr(os, name, _counted_path(disk, name, getattr(os, name)))
    for name in DESCRIPTORS:
        setattr(os, name, _counted_descriptor(disk, name, getattr(os, name)))
    os.open = _counted_os_open(disk, os.open)
    builtins.open = io.open = _counted_open(disk, io.open)


def _counted_path(disk: Disk, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    kind = {"remove": "unlink", "replace": "rename"}.get(name, name)

    def call(path: Any, *args: Any, **options: Any) -> Any:
        made = args[0] if name in ("link", "symlink") else path
        found = disk.inside(made, options.get("dir_fd"))
        if found is not None:
            disk.step(kind, found)
        return real(path, *args, **options)

    return call


def _counted_descriptor(disk: Disk, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    kind = {"fdatasync": "fsync", "ftruncate": "truncate"}.get(name, name if name == "fsync" else "write")

    def call(descriptor: Any, *args: Any, **options: Any) -> Any:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        found = disk.inside(args[0] if name == "copy_file_range" else number)
        if found is not None:
            disk.step(kind, found)
        return real(descriptor, *args, **options)

    return call


def _counted_os_open(disk: Disk, real: Callable[..., int]) -> Callable[..., int]:
    def call(path: Any, flags: int, *args: Any, **options: Any) -> int:
        found = disk.inside(path, options.get("dir_fd")) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
        if found is not None:
            disk.step("open", found)
        return real(path, flags, *args, **options)

    return call


def _counted_open(disk: Disk, real: Callable[..., Any]) -> Callable[..., Any]:
    class CountedFile(io.FileIO):
        """The raw layer of a file opened for writing."""

        def write(self, data: Any, /) -> int:
            view = memoryview(data).cast("B")
            place = disk.inside(self.fileno())
            if place is not None:
                disk.step("write", place, lambda: super(CountedFile, self).write(view[: len(view) // 2]))
            return super().write(data)

    def call(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        found = None if isinstance(file, int) or not set(mode) & set("wax+") else disk.inside(file)
        if found is None:
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        disk.step("open", found)
        raw = CountedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

    return call

"""The directory that a run writes: what it may replace, its hidden siblings, its lock, and the rename that publishes it.

A result grows in a hidden sibling, `.NAME.partial` for the directory `NAME`, and gets its name when it is complete.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...calibrate.model.safetensors_io import storage_errors
from ...errors import UsageError
from .record import is_result, record_of, write_record

MANIFEST = "manifest.json"
WORKING = (
    "partial",
    "distill",
    "chain",
    "allocation.json",
)  # siblings that a run leaves for the same command to take up
REPLACED = "replaced"


def sibling(out: Path, kind: str) -> Path:
    """The hidden sibling of `out` for one purpose."""
    return out.parent / f".{out.name}.{kind}"


def check_target(out: Path, overwrite: bool, *models: Path) -> None:
    """Raise `UsageError` if `out` exists and may not be replaced, or is, contains or lies inside one of the `models`.

    Only results of lmpress and empty directories are replaced. An existing `out` next to the working folder of a run passes:
    that run may have been stopped after it gave the result its name (see `is_published`).
    """
    if out.name in ("", ".."):
        raise UsageError(f"-o {out} does not name a new directory", "give the name of a directory to create")
    with storage_errors(out):
        _check_apart(out, models)
        if out.is_symlink():
            raise UsageError(f"{out} is a symbolic link", "choose another -o")
        if not out.exists():
            return
        if not overwrite and not any(os.path.lexists(sibling(out, kind)) for kind in WORKING):
            raise exists_already(out)
        if not out.is_dir():
            raise UsageError(f"{out} is a file", "choose a directory for -o")
        if overwrite and any(out.iterdir()) and not is_result(out):
            raise UsageError(
                f"{out} is not a result of lmpress, and --overwrite replaces only those", "choose another -o"
            )


def exists_already(out: Path) -> UsageError:
    """The error for an `out` that exists, without --overwrite."""
    return UsageError(f"{out} exists already", "choose another -o, or replace it with --overwrite")


def _check_apart(out: Path, models: tuple[Path, ...]) -> None:
    target = out.resolve()
    for model in models:
        source = model.resolve()
        if target == source:
            relation = "is"
        elif target in source.parents:
            relation = "contains"
        elif source in target.parents:
            relation = "lies inside"
        else:
            continue
        raise UsageError(f"the output {out} {relation} the model {model}", "choose another -o")


@contextmanager
def claimed(out: Path, overwrite: bool, *models: Path) -> Iterator[None]:
    """Reserve `out` for this run; a result that an interrupted replacement has moved away is put back first.

    Raises `UsageError` if another run is writing `out`, and what `check_target` raises.
    """
    check_target(out, overwrite, *models)
    with _locked(out):
        with storage_errors(out):
            _settle(out)
        check_target(out, overwrite, *models)
        yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of `out`: the system releases it when the process ends, however it ends."""
    path = sibling(out, "lock")
    with storage_errors(path):
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, out)
    try:
        yield
    finally:
        with suppress(OSError):  # a lock file that nobody holds does no harm
            path.unlink()
        os.close(descriptor)


def _lock(path: Path, out: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(f"another run is writing {out}", "wait for its end, or choose another -o") from None
        except OSError:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # its owner has just removed the file: a lock on it protects nothing


def _settle(out: Path) -> None:
    """End a replacement that was stopped between its two renames."""
    replaced = sibling(out, REPLACED)
    if os.path.lexists(replaced):
        check_private(replaced)
        if out.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(out)


def make_private(folder: Path) -> None:
    """Create the working folder `folder` with mode 0700, or take up the one that is there.

    Raises `UsageError` if that is not a directory (a symbolic link is not one) or belongs to another user.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        return
    check_private(folder)
    folder.chmod(0o700)


def check_private(folder: Path) -> None:
    """Raise `UsageError` if `folder` exists and is not a directory of this user (a symbolic link is not a directory)."""
    if not os.path.lexists(folder):
        return
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{folder} is not a directory, but lmpress works in this place", "remove it")
    if found.st_uid != os.geteuid():
        raise UsageError(f"{folder} belongs to another user, but lmpress works in this place", "choose another -o")


def publish(complete: Path, out: Path, request: str | None = None) -> None:
    """Give the finished directory `complete` the name `out`, with a record of its weights and of the `request` that it answers.

    An older result is moved away first and removed last; if anything fails in between, it gets its name back.
    """
    write_record(complete, request)
    replaced = sibling(out, REPLACED)
    _settle(out)
    try:
        if out.exists():
            out.rename(replaced)
        complete.rename(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


def is_published(out: Path, request: str) -> bool:
    """Whether `out` is the complete result of the request: a run that was stopped later left only its working folder."""
    return record_of(out).get("request") == request


def remove_working(folder: Path) -> None:
    """Remove a working folder, its manifest last: while that is there, the same command knows what the folder is."""
    if not folder.is_dir():
        return
    with storage_errors(folder):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.rmdir()


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder in a hidden sibling of `out` to write into, renamed to it when complete and removed otherwise."""
    working = sibling(out, "growing")
    with storage_errors(out):
        check_private(working)
        shutil.rmtree(working, ignore_errors=True)
        make_private(working)
        try:
            folder = working / out.name
            folder.mkdir()
            yield folder
            publish(folder, out)
        finally:
            shutil.rmtree(working, ignore_errors=True)

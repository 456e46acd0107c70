"""The folder for files that can be built again: private, because what is in it is executed.

It is in the user's cache (XDG base directories). If that cannot be used (no home, read-only, open to other users), a folder of
this user among the temporary files serves instead, and a warning says so once per process.
"""

import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ..kernel import Unavailable

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder in the user's cache, or the temporary one if the user has no home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME", "")
        found = Path(base) if Path(base).is_absolute() else Path(os.environ.get("HOME") or Path.home()) / ".cache"
    except RuntimeError:  # no home: HOME is not set, and the user id has no entry in passwd
        return temporary_folder()
    return found / "lmpress" / "kernels" if found.is_absolute() else temporary_folder()


def temporary_folder() -> Path:
    """The folder of this user among the temporary files. Raises `Unavailable` if there is no place for these."""
    try:
        return Path(tempfile.gettempdir()).absolute() / f"lmpress-{os.getuid()}" / "kernels"
    except FileNotFoundError as error:
        raise Unavailable(f"there is no folder for compiled kernels: {error.strerror}") from error


def private_folder() -> Path:
    """The first usable one of the cache folder and the temporary one, created if it is missing.

    Raises `Unavailable` if neither can be created and written, and closed to other users.
    """
    wanted = cache_folder()
    try:
        return _prepared(wanted)
    except Unavailable as error:
        if wanted == temporary_folder():
            raise
        reason = error.message
    found = _prepared(temporary_folder())
    _warn_once(f"{reason}; compiled kernels are kept in {found} instead (XDG_CACHE_HOME sets another cache)")
    return found


def check_private(path: Path) -> None:
    """Raise `Unavailable` unless `path` is not a link, belongs to this user, and is closed to all others."""
    status = path.lstat()
    if status.st_uid != os.getuid() or stat.S_ISLNK(status.st_mode) or status.st_mode & 0o077:
        raise Unavailable(f"{path} is open to other users: remove it, or restrict it to yourself (chmod 700)")


@contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """An empty file in the folder of `target`, removed at the end if it has not been renamed."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def replace_file(source: Path, target: Path) -> None:
    """Rename `source` to `target`, its content written to the disk first: a crash leaves no file without its content."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.replace(target)


def sweep(folder: Path, seconds: float) -> None:
    """Remove the temporary files of processes that ended early: those older than `seconds`."""
    for path in folder.glob(".*.*"):
        with suppress(OSError):  # another process sweeps too
            if time.time() - path.lstat().st_mtime > seconds:
                path.unlink()


def _prepared(folder: Path) -> Path:
    """`folder`, created if it is missing, and checked."""
    try:
        folder.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        check_private(folder)
        _check_parents(folder)
    except OSError as error:
        raise Unavailable(f"the cache folder {folder} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Unavailable(f"the cache folder {folder} cannot be written")
    return folder


def _check_parents(folder: Path) -> None:
    """Raise `Unavailable` if another user could replace a folder on the way to `folder`, by its name or by its links."""
    for path in (*folder.parents, *folder.resolve().parents):
        link, status = path.lstat(), path.stat()
        # A group that has the number of its user is that user's own, and users of sticky folders replace only what is theirs.
        others = stat.S_IWOTH if status.st_gid == status.st_uid else stat.S_IWOTH | stat.S_IWGRP
        writable = status.st_mode & others and not status.st_mode & stat.S_ISVTX
        if writable or {link.st_uid, status.st_uid} - {0, os.getuid()}:
            raise Unavailable(f"{path}, above the cache folder, is open to other users")


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)

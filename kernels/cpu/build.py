"""Compile a C file on first use into the user's cache, and load it.

The name of the built file is a hash of everything that went into it, so a stale one is never loaded. It is built beside its
final place and renamed, so two processes that build at once cannot see half a file. The folder belongs to the user alone:
what lies in it is executed.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from ..kernel import Unavailable

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
SECONDS = 300


def load(source: Path) -> ctypes.CDLL:
    """The shared library of the C file `source`, built if this user has not built it yet.

    Raises `Unavailable` where there is no compiler, it fails, or the cache cannot be trusted.
    """
    built = compiled(source)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise Unavailable(f"{built} cannot be loaded: {error}") from error


def compiled(source: Path) -> Path:
    """The path of the shared library of `source`; see `load`."""
    compiler = find_compiler()
    folder = private_folder()
    target = folder / f"{source.stem}-{fingerprint(source, compiler)}.so"
    if not target.exists():
        _compile(source, compiler, target)
    _check_private(target)
    return target


def find_compiler() -> str:
    """The full path of the system's C compiler."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise Unavailable("no C compiler found: install gcc or clang")


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again (XDG base directories)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "lmpress" / "kernels"


def private_folder() -> Path:
    """The cache folder, made if missing; nobody but the user may write to it or read it."""
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"the cache folder {folder} cannot be made: {error.strerror}") from error
    _check_private(folder)
    return folder


def fingerprint(source: Path, compiler: str) -> str:
    """A hash of the source, the compiler and its version, the flags and the machine's architecture."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout  # noqa: S603
    parts = [source.read_bytes(), compiler.encode(), version, " ".join(FLAGS).encode(), platform.machine().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _compile(source: Path, compiler: str, target: Path) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=".so")
    os.close(handle)
    built = Path(name)
    try:
        command = [compiler, *FLAGS, "-o", name, str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)  # noqa: S603
        if run.returncode != 0:
            reason = next((line for line in run.stderr.splitlines() if "error" in line), "no message")
            raise Unavailable(f"{compiler} cannot compile {source.name}: {reason}")
        built.chmod(0o700)
        built.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{source.name} cannot be built in {target.parent}: {error}") from error
    finally:
        built.unlink(missing_ok=True)


def _check_private(path: Path) -> None:
    status = path.lstat()
    if status.st_uid != os.getuid() or stat.S_ISLNK(status.st_mode) or status.st_mode & 0o077:
        raise Unavailable(f"{path} is open to other users: remove it, or make it yours alone (chmod 700)")

"""Compile a C file on first use into the user's cache, and load it.

The name of the library is a hash of everything that it is built from, so a stale one is never loaded. It is built in the folder
of its final path and then renamed, so two processes that build at the same time never see an incomplete file. Only the user may
write to the folder, because what is in it is executed.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from ..kernel import Unavailable

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
SECONDS = 300
INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def load(source: Path) -> ctypes.CDLL:
    """The shared library of the C file `source`, built if this user has not built it yet.

    Raises `Unavailable` if there is no compiler, if it fails, or if the cache cannot be trusted.
    """
    built = compiled(source)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise Unavailable(f"{built} cannot be loaded: {error}") from error


def compiled(source: Path) -> Path:
    """The path of the shared library of `source`, built if it is missing. Raises `Unavailable` as `load` does."""
    compiler = find_compiler()
    folder = private_folder()
    target = folder / f"{source.stem}-{fingerprint(source, compiler)}.so"
    if not target.exists():
        _compile(source, compiler, target)
    _check_private(target)
    return target


def find_compiler() -> str:
    """The full path of the system's C compiler. Raises `Unavailable` if there is none."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise Unavailable("no C compiler found: install gcc or clang")


def cache_folder() -> Path:
    """The folder for files that can be built again, in the user's cache (XDG base directories)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "lmpress" / "kernels"


def private_folder() -> Path:
    """The cache folder, created if it is missing. Raises `Unavailable` if that fails or if other users may open it."""
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"the cache folder {folder} cannot be created: {error.strerror}") from error
    _check_private(folder)
    return folder


def fingerprint(source: Path, compiler: str) -> str:
    """A hash of `source` and the files that it includes, the compiler and its version, the flags and the architecture."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout  # noqa: S603
    settings = [compiler.encode(), version, " ".join(FLAGS).encode(), platform.machine().encode()]
    parts = [path.read_bytes() for path in included_files(source)] + settings
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def included_files(source: Path) -> list[Path]:
    """`source` and all files that it includes with `#include "..."`, directly or through another one, each once.

    A file that does not exist is left out: the compiler reports it.
    """
    files = {source: None}  # in the order of their discovery
    unread = [source]
    while unread:
        path = unread.pop()
        for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
            included = path.parent / name
            if included.is_file() and included not in files:
                files[included] = None
                unread.append(included)
    return list(files)


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
        raise Unavailable(f"{path} is open to other users: remove it, or restrict it to yourself (chmod 700)")

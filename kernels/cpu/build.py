"""Compile a C file on first use into the user's cache, and load it.

The name of the library is a hash of everything that it is built from, so a stale one is never loaded. It is built in the folder
of its final path and then renamed, so two processes that build at the same time never see an incomplete file. Its size and
SHA-256 are stored next to it and compared before it is loaded: a truncated library would end the process. See `folders.py` for
where this is.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path

from ..kernel import Unavailable
from .folders import check_private, private_folder, replace_file, sweep, temporary_file

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
SECONDS, VERSION_SECONDS = 300, 30
INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def load(source: Path) -> ctypes.CDLL:
    """The shared library of the C file `source`, built if this user has not built it yet.

    Raises `Unavailable` if there is no compiler, if it fails, or if no folder can be trusted.
    """
    built = compiled(source)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise Unavailable(f"{built} cannot be loaded: {error}") from error


def compiled(source: Path) -> Path:
    """The path of the shared library of `source`, built if it is missing or damaged. Raises `Unavailable` as `load` does."""
    compiler = find_compiler()
    folder = private_folder()
    target = folder / f"{source.stem}-{fingerprint(source, compiler)}.so"
    try:
        if not is_intact(target):
            sweep(folder, 2 * SECONDS)
            _compile(source, compiler, target)
        check_private(target)
    except OSError as error:
        raise Unavailable(f"{source.name} cannot be built in {folder}: {error}") from error
    return target


def is_intact(library: Path) -> bool:
    """Whether the file is there and has the size and the SHA-256 that were stored when it was built."""
    try:
        return record_of(library).read_text(encoding="utf-8") == _record(library)
    except (OSError, UnicodeDecodeError):
        return False


def record_of(library: Path) -> Path:
    """The file with the size and the SHA-256 of `library`."""
    return library.with_suffix(".sha256")


def _record(library: Path) -> str:
    content = library.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


def find_compiler() -> str:
    """The full path of the system's C compiler. Raises `Unavailable` if there is none."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise Unavailable("no C compiler found: install gcc or clang")


def fingerprint(source: Path, compiler: str) -> str:
    """A hash of `source` and the files that it includes, the compiler and its version, the flags and the architecture.

    Raises `Unavailable` if the compiler cannot be started or does not end.
    """
    version = _run([compiler, "--version"], VERSION_SECONDS).stdout.encode()
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
    with temporary_file(target) as built:
        done = _run([compiler, *FLAGS, "-o", str(built), str(source)], SECONDS)
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            raise Unavailable(f"{compiler} cannot compile {source.name}: {reason}")
        built.chmod(0o700)
        with temporary_file(record_of(target)) as record:
            record.write_text(_record(built), encoding="utf-8")
            replace_file(record, record_of(target))
        replace_file(built, target)


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a compiler; what is not UTF-8 in its output is replaced. It and the programs that it starts end after `seconds`.

    Raises `Unavailable` if it cannot be started or does not end.
    """
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(  # noqa: S603 the system's compiler
            command,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that a signal reaches all of its programs, which hold its pipes open
        )
    except OSError as error:
        raise Unavailable(f"the compiler {command[0]} cannot be started: {error.strerror}") from error
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"the compiler {command[0]} did not end within {seconds} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(command, process.wait(), output, errors)

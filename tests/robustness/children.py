"""Runs one request in a forked child under limits, and judges what came of it.

The parent has imported torch and lmpress already, so that a child starts in milliseconds.
"""

import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

GIB = 2**30
MEMORY = 2 * GIB  # resident bytes in all, and private bytes on top of the parent's
CPU_SECONDS = 10
WALL_SECONDS = 60  # the machine may be busy with other things
FILE_BYTES = 2**28
EXIT_CODES = {0, 1, 2, 3}
ALLOCATION = re.compile(r"MemoryError|can't allocate memory|not enough memory|Cannot allocate memory|bad_alloc")
UNEXPECTED = re.compile(r"\bunexpected ([A-Z]\w*)|report it\b")


def settle() -> None:
    """Make this process one that can be forked: a single thread, no network, messages of one width."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100"}
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Outcome:
    """How a child ended: `code` is its exit code, or minus the signal that ended it."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int
    timed_out: bool = False

    @property
    def output(self) -> str:
        """Both streams."""
        return self.stdout + self.stderr

    @property
    def error_lines(self) -> list[str]:
        """The lines that report an error."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def run_child(
    action: Callable[[], int], folder: Path, cpu_seconds: int = CPU_SECONDS, wall_seconds: float = WALL_SECONDS
) -> Outcome:
    """Run `action` in a forked child that works in `folder`, its streams in files there; its value is the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _serve(action, folder, cpu_seconds)
    status, usage, timed_out = _wait(child, wall_seconds)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(
        code=code,
        stdout=(folder / "stdout").read_text(errors="replace"),
        stderr=(folder / "stderr").read_text(errors="replace"),
        seconds=time.monotonic() - started,
        peak_bytes=usage.ru_maxrss * 1024,
        timed_out=timed_out or code == -signal.SIGXCPU,
    )


def _serve(action: Callable[[], int], folder: Path, cpu_seconds: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
        _limit(cpu_seconds)
        code = action()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 the interpreter would print it too
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit(cpu_seconds: int) -> None:
    private = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    most = int(private.split()[1]) * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _wait(child: int, wall_seconds: float) -> tuple[int, resource.struct_rusage, bool]:
    """Exit status and usage of `child`, and whether it had to be stopped; its whole process group goes with it."""
    handle = os.pidfd_open(child)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    ended = bool(poll.poll(wall_seconds * 1000))
    os.close(handle)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return status, usage, not ended


def faults(outcome: Outcome) -> list[str]:
    """What is wrong with the way in which a child ended; nothing for a clean end, with or without an error."""
    if outcome.timed_out:
        return ["hang"]
    found = []
    if outcome.peak_bytes > MEMORY or ALLOCATION.search(outcome.output):
        found.append("memory")
    if outcome.code < 0:
        return [*found, signal.Signals(-outcome.code).name]
    if outcome.code not in EXIT_CODES:
        found.append(f"exit code {outcome.code}")
    if "Traceback (most recent call last)" in outcome.output:
        found.append(f"traceback {_last_word(outcome.stderr)}")
    elif unexpected := UNEXPECTED.search(outcome.stderr):
        found.append(f"unexpected {unexpected[1] or ''}".strip())
    elif outcome.code in (1, 2) and len(outcome.error_lines) != 1:
        found.append(f"{len(outcome.error_lines)} error lines")
    return found


def _last_word(stderr: str) -> str:
    """The class of the exception that a traceback ends with."""
    raised = [
        line for line in stderr.splitlines() if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt|Warning)(:|$)", line)
    ]
    return raised[-1].split(":")[0].split(".")[-1] if raised else "unknown"

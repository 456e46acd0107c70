"""What is wrong with a child is seen: each fault planted once, and none found in a clean end."""

import os
import signal
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # other tests' threads are of no concern


def spin() -> int:
    while True:
        pass


def sleep() -> int:
    import time

    time.sleep(60)
    return 0


def fill() -> int:
    return len(b"x" * (5 * 2**30)) * 0


def fail() -> int:
    raise KeyError("x")


def say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


PLANTED = {
    "hang": (spin, ["hang"]),
    "sleep": (sleep, ["hang"]),
    "memory": (fill, ["memory", "traceback MemoryError"]),
    "traceback": (fail, ["traceback KeyError"]),
    "signal": (lambda: os.kill(os.getpid(), signal.SIGKILL) or 0, ["SIGKILL"]),
    "exit code": (lambda: say("error: x", 7), ["exit code 7"]),
    "no word": (lambda: 1, ["0 error lines"]),
    "two errors": (lambda: say("error: x\nerror: y", 2), ["2 error lines"]),
    "unexpected": (lambda: say("error: unexpected TypeError: x", 1), ["unexpected TypeError"]),
    "clean": (lambda: 0, []),
    "broken": (lambda: 3, []),
    "one error": (lambda: say("error: x\nhint: y", 2), []),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(helper, tmp_path: Path, name: str) -> None:
    children = helper("children")
    action, expected = PLANTED[name]
    outcome = children.run_child(action, tmp_path, cpu_seconds=1, wall_seconds=10 if name != "sleep" else 1)
    assert children.faults(outcome) == expected, outcome


def test_memory_that_is_used_counts_even_without_an_error(helper, tmp_path: Path) -> None:
    children = helper("children")
    outcome = children.Outcome(code=0, stdout="", stderr="", seconds=1.0, peak_bytes=children.MEMORY + 1)
    assert children.faults(outcome) == ["memory"]


def test_streams_and_exit_codes_come_back(helper, tmp_path: Path) -> None:
    children = helper("children")

    def act() -> int:
        print("data")
        print("words", file=sys.stderr)
        sys.exit(2)

    outcome = children.run_child(act, tmp_path)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (2, "data\n", "words\n")
    assert outcome.error_lines == [] and outcome.output == "data\nwords\n"

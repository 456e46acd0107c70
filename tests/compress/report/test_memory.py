"""Memory that was freed goes back, in a process of its own so that nothing else's memory counts."""

import ctypes
import subprocess
import sys

import pytest

from lmpress.compress.report.memory import peak_bytes

KEPT, FREED = 40, 24 << 20  # pieces that stay between those that go, and bytes that go
PROGRAM = f"""
import torch
from lmpress.compress.report.memory import return_freed_pages, give_back

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def holes(size):
    pieces = [torch.ones(size, dtype=torch.uint8) for _ in range(2 * {KEPT})]
    before = resident()
    del pieces[::2]
    return pieces, before

torch.ones(1 << 24)  # glibc keeps what is smaller than what was freed before
with return_freed_pages():
    kept, before = holes({FREED} // {KEPT} + (1 << 20))
    at_once = before - resident()
small, before = holes({FREED} // {KEPT})

give_back()
print(at_once, before - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this system's memory is not glibc's")
def test_what_was_freed_between_what_stays_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    at_once, given_back = map(int, done.stdout.split())
    assert at_once > FREED
    assert given_back > 0.9 * FREED


def test_the_peak_is_counted_in_bytes() -> None:
    assert 10 << 20 < peak_bytes() < 1 << 40

"""The memory of this process: its peak, and the return of freed pages to the operating system."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
SMALL, USUAL = 2**20, 2**25  # bytes from which freed memory is returned at once; the usual one is glibc's largest


@contextmanager
def return_freed_pages() -> Iterator[None]:
    """Let glibc return every freed matrix at once: by default it keeps those below 32 MB, and fragments of them.

    Afterwards the usual threshold applies again, because inference allocates the same memory repeatedly.
    """
    libc = ctypes.CDLL(None)
    is_glibc = hasattr(libc, "mallopt")
    if is_glibc:
        libc.mallopt(M_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        if is_glibc:
            libc.mallopt(M_MMAP_THRESHOLD, USUAL)


def give_back() -> None:
    """Return freed memory now, if the C library is glibc, which keeps much of it between allocations that are in use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

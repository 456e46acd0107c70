"""The memory of this process: how much it took, and giving back what was freed."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
SMALL, USUAL = 2**20, 2**25  # bytes from which on freed memory goes back at once; the usual one is glibc's own largest


@contextmanager
def return_freed_pages() -> Iterator[None]:
    """Have glibc give every freed matrix back at once: by itself it keeps those below 32 MB, and fragments of them.

    Afterwards it is as usual again: models that run want the same memory over and over.
    """
    libc = ctypes.CDLL(None)
    can_tell = hasattr(libc, "mallopt")
    if can_tell:
        libc.mallopt(M_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        if can_tell:
            libc.mallopt(M_MMAP_THRESHOLD, USUAL)


def give_back() -> None:
    """Give what was freed back now, where that is glibc's to do: between what stays, it keeps a lot."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

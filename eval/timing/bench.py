"""Kernels against torch's own products and those of other libraries: shapes by batch sizes, on this machine's CPU.

How it is measured: every candidate multiplies by a ring of copies of its weight that is larger than any cache, as a model's
layers are; candidates take turns, in a new order in each round, so what disturbs one disturbs all; a time is the CPU time of
the calling thread (the clock's where there are several threads); medians. A candidate whose result is off is reported and
not timed. Quantizing the inputs is part of the time. The roofline is the time that the weight's bytes take a loop that only
reads, or the product's operations at the rate of the machine's float32 product, whichever is longer: int8 products may beat it.
"""

import ctypes
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compress.errors import UsageError
from ...compress.report.progress import Event, Observer, silent
from ...kernels.cpu import build, library
from .candidates import BASELINE, GROUP, RING_BYTES, Candidate, candidates

STREAM = Path(library.__file__).with_name("stream.c")
SQUARE = 1024  # of the product whose rate is the machine's
MANY = 256  # rows of inputs from which fewer rounds do


@dataclass(frozen=True)
class Timing:
    """One candidate at one shape; times and what follows from them are None where its `error` was above the tolerance.

    `ratio` is how many times as fast as torch's float32 product it is, `roofline` the share of what the machine can do.
    """

    name: str
    rows: int
    columns: int
    inputs: int
    error: float
    median_ms: float | None = None
    fastest_ms: float | None = None
    slowest_ms: float | None = None
    ratio: float | None = None
    roofline: float | None = None


@dataclass(frozen=True)
class Machine:
    """Where the times were taken: rates in gigabytes and in gigaflops per second."""

    cpu: str
    instruction_sets: tuple[str, ...]
    torch: str
    threads: int
    clock: str
    ring_bytes: int
    read_rate: float
    product_rate: float


@dataclass(frozen=True)
class Bench:
    """All timings, shape after shape, batch size after batch size, in the order of the candidates."""

    machine: Machine
    timings: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def bench(
    shapes: Sequence[str] = ("4096x4096", "11008x4096"),
    inputs: Sequence[int] = (1, 8, 64, 512),
    *,
    rounds: int = 15,
    only: str = "",
    progress: Observer = silent,
) -> Bench:
    """Time every candidate whose name the regular expression `only` finds, for each shape `OUTxIN` and number of input rows.

    Raises `UsageError` for shapes that are none and for an expression that is none, `Unavailable` without a C compiler.
    """
    sizes = [_parse(shape) for shape in shapes]
    try:
        re.compile(only)
    except re.error as error:
        raise UsageError(f"{only!r} is no regular expression: {error}") from error
    machine = _machine()
    timings: list[Timing] = []
    for index, (rows, columns) in enumerate(sizes):
        found = list(candidates(rows, columns, only))
        for each, m in enumerate(inputs):
            timings += _measure(found, (rows, columns), m, rounds, machine)
            progress(Event("bench", block=index * len(inputs) + each + 1, blocks=len(sizes) * len(inputs)))
        found.clear()  # gigabytes, which the next shape needs
    return Bench(machine, tuple(timings))


def clock() -> Callable[[], float]:
    """The clock that a busy machine disturbs least: the thread's own time, or with several threads the wall's."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _parse(shape: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", shape)
    rows, columns = (int(n) for n in found.groups()) if found else (0, 0)
    if not rows or not columns or columns % GROUP:
        raise UsageError(f"{shape!r} is no shape", f"write OUTxIN, IN a multiple of {GROUP}: 4096x4096,11008x4096")
    return rows, columns


def _measure(found: list[Candidate], shape: tuple[int, int], m: int, rounds: int, machine: Machine) -> list[Timing]:
    """A timing per candidate, in rounds in which each takes its turn."""
    x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m))
    errors = {c.name: _relative_error(c.ring[0](x), _in_float64(x, c.dense())) for c in found}
    right = [c for c in found if errors[c.name] <= c.tolerance]
    times: dict[str, list[float]] = {c.name: [] for c in right}
    turns = {c.name: cycle(c.ring) for c in right}
    now, order = clock(), random.Random(m)  # noqa: S311
    for _ in range(rounds if m < MANY else max(3, rounds // 3)):
        for c in order.sample(right, len(right)):
            work = next(turns[c.name])
            start = now()
            work(x)
            times[c.name].append(now() - start)
    base = statistics.median(times[BASELINE])
    return [_timing(c, shape, m, errors[c.name], times.get(c.name), base, machine) for c in found]


def _timing(
    c: Candidate, shape: tuple[int, int], m: int, error: float, times: list[float] | None, base: float, machine: Machine
) -> Timing:
    if times is None:
        return Timing(c.name, *shape, m, error)
    median = statistics.median(times)
    least = max(c.bytes / machine.read_rate, 2 * shape[0] * shape[1] * m / machine.product_rate) / 1e9
    milliseconds = (1e3 * t for t in (median, min(times), max(times)))
    return Timing(c.name, *shape, m, error, *milliseconds, ratio=base / median, roofline=least / median)


def _in_float64(x: Tensor, weight: Tensor) -> Tensor:
    """The product of at most 8 rows."""
    return x[:8].double() @ weight.double().T


def _relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y[: len(expected)].double() - expected).norm() / expected.norm())


def _machine() -> Machine:
    return Machine(
        cpu=_cpu_name(),
        instruction_sets=tuple(library.instruction_sets()),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        clock="thread CPU time" if torch.get_num_threads() == 1 else "wall clock",
        ring_bytes=RING_BYTES,
        read_rate=_read_rate(),
        product_rate=_product_rate(),
    )


def _read_rate() -> float:
    """Gigabytes per second of a loop in one thread that only reads: the best of five."""
    read = build.load(STREAM).read_stream
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    memory = torch.ones(RING_BYTES, dtype=torch.uint8)
    return memory.nbytes / _fastest(lambda: read(memory.data_ptr(), memory.nbytes)) / 1e9


def _product_rate() -> float:
    """Gigaflops per second of a square float32 product."""
    square = torch.randn(SQUARE, SQUARE, generator=torch.Generator().manual_seed(0))
    return 2 * SQUARE**3 / _fastest(lambda: square @ square) / 1e9


def _fastest(work: Callable[[], object]) -> float:
    now, seconds = clock(), []
    for _ in range(5):
        start = now()
        work()
        seconds.append(now() - start)
    return min(seconds)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} family {facts.get('cpu family')} model {facts.get('model')}"

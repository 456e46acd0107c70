"""Kernels against torch's own products and those of other libraries: shapes by batch sizes, on a CPU or a GPU.

How it is measured: every candidate multiplies by a ring of copies of its weight that is larger than any cache, as a model's
layers are; candidates take turns, in a new order in each round, so what disturbs one disturbs all; a time is the CPU time of
the calling thread (the clock's where there are several threads), on a GPU that of a CUDA graph of the whole ring; medians. A
candidate whose result is off is reported and not timed. Quantizing the inputs is part of the time. The roofline is the time
that the weight's bytes take what only reads, or the product's operations at the rate of the machine's product in the baseline's
dtype, whichever is longer: int8 products may beat it.
"""

import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...compress.report.progress import Event, Observer, silent
from ...errors import UsageError
from ...kernels.triton.product import TritonProduct, tune_tiles
from .machine import Call, Machine, Place, machine_of, place_of
from .products import GROUP, Candidate, candidates

MANY = 256  # rows of inputs from which fewer rounds do
TRIES = 5  # of a tile that may be the fastest: medians count


@dataclass(frozen=True)
class Timing:
    """One candidate at one shape; times and what follows from them are None where its `error` was above the tolerance.

    `ratio` is how many times as fast as the baseline, a dense product of torch, it is, `roofline` the share of what the machine
    can do.
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
    device: str = "cpu",
    tune: bool = False,
    progress: Observer = silent,
) -> Bench:
    """Time every candidate whose name the regular expression `only` finds, for each shape `OUTxIN` and number of input rows.

    With `tune` the fastest tiles of the Triton kernels are searched first, for what has none yet, and kept for every later
    process. Raises `UsageError` for shapes that are none, an expression that is none, a device that is not there and `tune`
    without a GPU, `Unavailable` without a C compiler.
    """
    sizes = [_parse(shape) for shape in shapes]
    try:
        re.compile(only)
    except re.error as error:
        raise UsageError(f"{only!r} is no regular expression: {error}") from error
    place = place_of(device)
    if tune and place.device.type == "cpu":
        raise UsageError("tiles are searched on a GPU", "leave out --tune, or give --device cuda")
    machine = machine_of(place)
    timings: list[Timing] = []
    for index, (rows, columns) in enumerate(sizes):
        found = list(candidates(rows, columns, only, place.device, place.dtype))
        rings = {c.name: c.ring(place.ring_bytes) for c in found}
        if tune:
            for ring in rings.values():
                search(ring, inputs, place)
        for each, m in enumerate(inputs):
            timings += _measure(found, rings, (rows, columns), m, rounds, place, machine)
            progress(Event("bench", block=index * len(inputs) + each + 1, blocks=len(sizes) * len(inputs)))
        found.clear()  # gigabytes, which the next shape needs
        rings.clear()
    return Bench(machine, tuple(timings))


def search(ring: Sequence[Call], inputs: Sequence[int], place: Place) -> None:
    """Find and keep the tiles of the Triton products in `ring`, where these are what it is made of."""
    whole = [each for each in ring if isinstance(each, nn.Module)]
    products = [part for each in whole for part in each.modules() if isinstance(part, TritonProduct)]
    if products:
        tune_tiles(products, inputs, place.dtype, lambda calls, x: _median(calls, x, place))


def _median(calls: Sequence[Call], x: Tensor, place: Place) -> float:
    seconds = place.timer(calls, x)
    return statistics.median(seconds() for _ in range(TRIES))


def _parse(shape: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", shape)
    rows, columns = (int(n) for n in found.groups()) if found else (0, 0)
    if not rows or not columns or columns % GROUP:
        raise UsageError(f"{shape!r} is no shape", f"write OUTxIN, IN a multiple of {GROUP}: 4096x4096,11008x4096")
    return rows, columns


def _measure(
    found: list[Candidate],
    rings: dict[str, list[Call]],
    shape: tuple[int, int],
    m: int,
    rounds: int,
    place: Place,
    machine: Machine,
) -> list[Timing]:
    """A timing per candidate, in rounds in which each takes its turn."""
    x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m)).to(place.device, place.dtype)
    errors = {c.name: _relative_error(rings[c.name][0](x), _in_float64(x, c.dense())) for c in found}
    right = [c.name for c in found if errors[c.name] <= c.tolerance]
    times: dict[str, list[float]] = {name: [] for name in right}
    timers, order = {name: place.timer(rings[name], x) for name in right}, random.Random(m)  # noqa: S311
    for _ in range(rounds if m < MANY else max(3, rounds // 3)):
        for name in order.sample(right, len(right)):
            times[name].append(timers[name]())
    base = statistics.median(times[place.baseline])
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

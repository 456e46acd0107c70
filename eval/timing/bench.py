"""Kernels compared with torch's own products and those of other libraries: shapes by batch sizes, on a CPU or a GPU.

Every product multiplies by a ring of copies of its weight that is larger than any cache, as the layers of a model are. Products
take turns, in a new order in each round, so that a disturbance affects all of them. A time is the CPU time of the calling
thread (wall-clock time with several threads), on a GPU that of a CUDA graph of the whole ring; results are medians. A product
whose result is wrong is reported and not timed. Quantizing the inputs is part of the time. The roofline is the time to read the
weight's bytes at the machine's read rate, or to compute the operations at the rate of its product in the baseline's dtype,
whichever is longer: int8 products may be faster than that.
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
from .machine import Call, Machine, TimingDevice, describe_machine, timing_device
from .products import GROUP, Product, products

MANY = 256  # rows of inputs from which fewer rounds are enough
TRIES = 5  # times that a tile is measured; the median counts


@dataclass(frozen=True)
class Timing:
    """One product at one shape; times, `ratio` and `roofline` are None if its relative `error` was above the tolerance.

    `ratio` is the time of the baseline, a dense product of torch, over this product's; `roofline` is the shortest possible time
    over this product's.
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
    """All timings, shape after shape, batch size after batch size, in the order of the products."""

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
    """Time every product whose name matches the regular expression `only`, for each shape `OUTxIN` and number of input rows.

    With `tune` the fastest tiles of the Triton kernels are searched first, for shapes that have none yet, and kept for later
    processes. Raises `UsageError` for an invalid shape or expression, an unknown device, or `tune` without a GPU, `Unavailable`
    if there is no C compiler.
    """
    sizes = [_parse(shape) for shape in shapes]
    try:
        re.compile(only)
    except re.error as error:
        raise UsageError(f"--only expects a regular expression, got {only!r}: {error}") from error
    target = timing_device(device)
    if tune and target.device.type == "cpu":
        raise UsageError("--tune needs a GPU, and the device is the CPU", "leave out --tune, or give --device cuda")
    machine = describe_machine(target)
    timings: list[Timing] = []
    for index, (rows, columns) in enumerate(sizes):
        found = list(products(rows, columns, only, target.device, target.dtype))
        rings = {product.name: product.ring(target.ring_bytes) for product in found}
        if tune:
            for ring in rings.values():
                search(ring, inputs, target)
        for each, m in enumerate(inputs):
            timings += _measure(found, rings, (rows, columns), m, rounds, target, machine)
            progress(Event("bench", block=index * len(inputs) + each + 1, blocks=len(sizes) * len(inputs)))
        found.clear()  # frees gigabytes for the next shape
        rings.clear()
    return Bench(machine, tuple(timings))


def search(ring: Sequence[Call], inputs: Sequence[int], target: TimingDevice) -> None:
    """Find and keep the fastest tiles of the Triton products in `ring`; other products have no tiles."""
    whole = [each for each in ring if isinstance(each, nn.Module)]
    triton = [part for each in whole for part in each.modules() if isinstance(part, TritonProduct)]
    if triton:
        tune_tiles(triton, inputs, target.dtype, lambda calls, x: _median(calls, x, target))


def _median(calls: Sequence[Call], x: Tensor, target: TimingDevice) -> float:
    seconds = target.timer(calls, x)
    return statistics.median(seconds() for _ in range(TRIES))


def _parse(shape: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", shape)
    rows, columns = (int(n) for n in found.groups()) if found else (0, 0)
    if not rows or not columns or columns % GROUP:
        raise UsageError(
            f"--shapes expects OUTxIN, got {shape!r}", f"IN must be a multiple of {GROUP}: 4096x4096,11008x4096"
        )
    return rows, columns


def _measure(
    found: list[Product],
    rings: dict[str, list[Call]],
    shape: tuple[int, int],
    m: int,
    rounds: int,
    target: TimingDevice,
    machine: Machine,
) -> list[Timing]:
    """One target per product, in rounds in which the products take turns."""
    x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m)).to(target.device, target.dtype)
    errors = {
        product.name: _relative_error(rings[product.name][0](x), _in_float64(x, product.dense())) for product in found
    }
    right = [product.name for product in found if errors[product.name] <= product.tolerance]
    times: dict[str, list[float]] = {name: [] for name in right}
    timers, order = {name: target.timer(rings[name], x) for name in right}, random.Random(m)  # noqa: S311
    for _ in range(rounds if m < MANY else max(3, rounds // 3)):
        for name in order.sample(right, len(right)):
            times[name].append(timers[name]())
    base = statistics.median(times[target.baseline])
    return [
        _timing(product, shape, m, errors[product.name], times.get(product.name), base, machine) for product in found
    ]


def _timing(
    product: Product,
    shape: tuple[int, int],
    m: int,
    error: float,
    times: list[float] | None,
    base: float,
    machine: Machine,
) -> Timing:
    if times is None:
        return Timing(product.name, *shape, m, error)
    median = statistics.median(times)
    least = max(product.bytes / machine.read_rate, 2 * shape[0] * shape[1] * m / machine.product_rate) / 1e9
    milliseconds = (1e3 * t for t in (median, min(times), max(times)))
    return Timing(product.name, *shape, m, error, *milliseconds, ratio=base / median, roofline=least / median)


def _in_float64(x: Tensor, weight: Tensor) -> Tensor:
    """The product of the first 8 rows."""
    return x[:8].double() @ weight.double().T


def _relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y[: len(expected)].double() - expected).norm() / expected.norm())

"""Where products are timed: this CPU or a GPU, each with its clock, its baseline and its rates."""

import ctypes
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from ...calibrate.model.skeleton import device_of
from ...kernels.cpu import build, library

STREAM = Path(library.__file__).with_name("stream.c")
RING_BYTES = 4 * 32 << 20  # of all copies of a weight together, on CPUs
SETTLING = 0.02  # seconds
CACHES = 4  # and on GPUs as many times as their last cache holds
SQUARE = 1024  # of the product whose rate is the machine's, on CPUs
GPU_SQUARE, GPU_READ = 8192, 1 << 30

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Machine:
    """Where the times were taken: rates in gigabytes and in gigaflops per second, those of products in the baseline's dtype."""

    cpu: str
    instruction_sets: tuple[str, ...]
    torch: str
    threads: int
    clock: str
    ring_bytes: int
    read_rate: float
    product_rate: float
    dtype: str = "float32"
    gpu: str | None = None
    triton: str | None = None

    @property
    def name(self) -> str:
        """One line for people."""
        return f"{self.cpu}, {self.threads} thread(s)" if self.gpu is None else f"{self.gpu}, triton {self.triton}"


@dataclass(frozen=True)
class Place:
    """`timer` takes what multiplies by copies of one weight, and inputs, and gives a function that times one of the calls.

    dtype       of the inputs, and of the product of torch that is the baseline
    ring_bytes  how much memory the copies must fill, so that no cache holds the next one
    """

    device: torch.device
    dtype: torch.dtype
    ring_bytes: int
    timer: Callable[[Sequence[Call], Tensor], Callable[[], float]]

    @property
    def baseline(self) -> str:
        """The name of the candidate that all others are compared with."""
        return f"torch {str(self.dtype).removeprefix('torch.')}"


def place_of(device: str = "cpu") -> Place:
    """Where `device` is. Raises `UsageError` where this machine has none of that name."""
    found = device_of(device)
    if found.type == "cpu":
        return Place(found, torch.float32, RING_BYTES, in_turns)
    cache = torch.cuda.get_device_properties(found).L2_cache_size
    return Place(found, torch.bfloat16, max(RING_BYTES, CACHES * cache), as_a_graph)


def clock() -> Callable[[], float]:
    """The clock that a busy machine disturbs least: the thread's own time, or with several threads the wall's."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def in_turns(ring: Sequence[Call], x: Tensor) -> Callable[[], float]:
    """Times one call, the next time that of the next copy. Of several threads, calls before it wake those that sleep, while
    those of the product before, which wait for more work on the same cores, go to sleep."""
    turns, now = cycle(ring), clock()

    def seconds() -> float:
        until = time.perf_counter() + (SETTLING if torch.get_num_threads() > 1 else 0)
        while time.perf_counter() < until:
            next(turns)(x)
        work = next(turns)
        start = now()
        work(x)
        return now() - start

    return seconds


def as_a_graph(ring: Sequence[Call], x: Tensor) -> Callable[[], float]:
    """Times all copies as one CUDA graph and divides: a call of its own takes longer to launch than to run."""
    with torch.cuda.device_of(x):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # kernels are compiled before they are captured
            for work in ring:
                work(x)
        torch.cuda.current_stream().wait_stream(beside)
        graph, start, end = torch.cuda.CUDAGraph(), torch.cuda.Event(True), torch.cuda.Event(True)
        with torch.cuda.graph(graph):
            for work in ring:
                work(x)

    def seconds() -> float:
        with torch.cuda.device_of(x):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(ring)

    return seconds


def machine_of(place: Place) -> Machine:
    """What the machine is and can do there. Raises `Unavailable` without a C compiler, on CPUs."""
    on_gpu = place.device.type != "cpu"
    clock_name = "thread CPU time" if torch.get_num_threads() == 1 else "wall clock"
    return Machine(
        cpu=cpu_name(),
        instruction_sets=() if on_gpu else tuple(library.instruction_sets()),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        clock="CUDA graphs of all copies" if on_gpu else clock_name,
        ring_bytes=place.ring_bytes,
        read_rate=_gpu_read_rate(place) if on_gpu else _read_rate(),
        product_rate=_product_rate(place, GPU_SQUARE if on_gpu else SQUARE),
        dtype=str(place.dtype).removeprefix("torch."),
        gpu=torch.cuda.get_device_name(place.device) if on_gpu else None,
        triton=version("triton") if on_gpu else None,
    )


def _read_rate() -> float:
    """Gigabytes per second of a loop in one thread that only reads: the best of five."""
    read = build.load(STREAM).read_stream
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    memory = torch.ones(RING_BYTES, dtype=torch.uint8)

    def work(x: Tensor) -> Tensor:
        read(x.data_ptr(), x.nbytes)
        return x

    return memory.nbytes / _fastest(in_turns([work], memory)) / 1e9


def _gpu_read_rate(place: Place) -> float:
    """The same of torch's sum."""
    memory = torch.ones(GPU_READ // 4, device=place.device)
    return memory.nbytes / _fastest(place.timer([torch.sum], memory)) / 1e9


def _product_rate(place: Place, size: int) -> float:
    """Gigaflops per second of a square product in the baseline's dtype."""
    square = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(place.device, place.dtype)
    return 2 * size**3 / _fastest(place.timer([lambda x: x @ x], square)) / 1e9


def _fastest(seconds: Callable[[], float]) -> float:
    return min(seconds() for _ in range(5))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} family {facts.get('cpu family')} model {facts.get('model')}"

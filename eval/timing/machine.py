"""The device that products are timed on, this CPU or a GPU: its clock, its baseline product and its rates."""

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
RING_BYTES = 4 * 32 << 20  # all copies of a weight together, on CPUs
SETTLING = 0.02  # seconds
CACHES = 4  # on GPUs, at least this many times the size of the last cache
SQUARE = 1024  # size of the product that measures the machine's rate, on CPUs
GPU_SQUARE, GPU_READ = 8192, 1 << 30

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Machine:
    """The machine of a benchmark: `read_rate` in gigabytes per second, `product_rate` in gigaflops per second in `dtype`."""

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
        """One line that names the machine."""
        return f"{self.cpu}, {self.threads} thread(s)" if self.gpu is None else f"{self.gpu}, triton {self.triton}"


@dataclass(frozen=True)
class TimingDevice:
    """A device with its method of target.

    dtype       of the inputs, and of torch's product that is the baseline
    ring_bytes  how much memory the copies of a weight must fill, so that no cache holds the next one
    timer       takes calls that multiply by the copies of one weight, and inputs; returns a function that times one call
    """

    device: torch.device
    dtype: torch.dtype
    ring_bytes: int
    timer: Callable[[Sequence[Call], Tensor], Callable[[], float]]

    @property
    def baseline(self) -> str:
        """The name of the product that all others are compared with."""
        return f"torch {str(self.dtype).removeprefix('torch.')}"


def timing_device(device: str = "cpu") -> TimingDevice:
    """How `device` is timed. Raises `UsageError` if this machine has no such device."""
    found = device_of(device)
    if found.type == "cpu":
        return TimingDevice(found, torch.float32, RING_BYTES, time_calls)
    cache = torch.cuda.get_device_properties(found).L2_cache_size
    return TimingDevice(found, torch.bfloat16, max(RING_BYTES, CACHES * cache), time_graph)


def clock() -> Callable[[], float]:
    """The clock that other work disturbs least: the CPU time of the thread, or with several threads the wall clock."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def time_calls(ring: Sequence[Call], x: Tensor) -> Callable[[], float]:
    """A function that times one call, each time that of the next copy.

    With several threads, untimed calls come first: they wake this product's threads, and meanwhile the threads of the previous
    product, which still wait for work on the same cores, go to sleep.
    """
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


def time_graph(ring: Sequence[Call], x: Tensor) -> Callable[[], float]:
    """A function that times all copies as one CUDA graph and divides: a single call takes longer to launch than to run."""
    with torch.cuda.device_of(x):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled before they are captured
            for work in ring:
                work(x)
        torch.cuda.current_stream().wait_stream(side)
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


def describe_machine(target: TimingDevice) -> Machine:
    """The machine with its measured rates. Raises `Unavailable` on CPUs if there is no C compiler."""
    on_gpu = target.device.type != "cpu"
    clock_name = "thread CPU time" if torch.get_num_threads() == 1 else "wall clock"
    return Machine(
        cpu=cpu_name(),
        instruction_sets=() if on_gpu else tuple(library.instruction_sets()),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        clock="CUDA graphs of all copies" if on_gpu else clock_name,
        ring_bytes=target.ring_bytes,
        read_rate=_gpu_read_rate(target) if on_gpu else _read_rate(),
        product_rate=_product_rate(target, GPU_SQUARE if on_gpu else SQUARE),
        dtype=str(target.dtype).removeprefix("torch."),
        gpu=torch.cuda.get_device_name(target.device) if on_gpu else None,
        triton=version("triton") if on_gpu else None,
    )


def _read_rate() -> float:
    """Gigabytes per second of a loop that only reads, in one thread: the best of five."""
    read = build.load(STREAM).read_stream
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    memory = torch.ones(RING_BYTES, dtype=torch.uint8)

    def work(x: Tensor) -> Tensor:
        read(x.data_ptr(), x.nbytes)
        return x

    return memory.nbytes / _fastest(time_calls([work], memory)) / 1e9


def _gpu_read_rate(target: TimingDevice) -> float:
    """Gigabytes per second of torch's sum on a GPU: the best of five."""
    memory = torch.ones(GPU_READ // 4, device=target.device)
    return memory.nbytes / _fastest(target.timer([torch.sum], memory)) / 1e9


def _product_rate(target: TimingDevice, size: int) -> float:
    """Gigaflops per second of a square product in the baseline's dtype."""
    square = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(target.device, target.dtype)
    return 2 * size**3 / _fastest(target.timer([lambda x: x @ x], square)) / 1e9


def _fastest(seconds: Callable[[], float]) -> float:
    return min(seconds() for _ in range(5))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} family {facts.get('cpu family')} model {facts.get('model')}"

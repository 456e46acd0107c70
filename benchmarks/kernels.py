"""Time the CPU kernels against torch's own products, and onnxruntime's if it is installed.

    python benchmarks/kernels.py [--shapes 4096x4096,11008x4096] [--rows 1,8,64,512] [--threads 1] [--only c-avx2,...]

How it is measured: every candidate multiplies by a ring of copies of its weight that is larger than any cache, as a model's
layers are; candidates take turns, in a new order in each round, so what disturbs one disturbs all; a time is the CPU time of
the calling thread (the clock's where there are several threads); medians. A candidate whose result is off is reported and
not timed. Quantizing the inputs is part of the time. The share of the bandwidth is the weight's bytes by the median, against
a loop that only reads. Writes benchmarks/results/kernels-<cpu>-<threads>t.json and prints a table.
"""

import argparse
import ctypes
import json
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmpress.kernels import apart, dispatch
from lmpress.kernels.cpu import build, library
from lmpress.kernels.kernel import Activations, Kernel, Need
from lmpress.kernels.weight import SparseRows, Weight

RING_BYTES = 4 * 32 << 20
GROUP = 128
NEGATIVE = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
POSITIVE = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
NF4 = torch.tensor([*NEGATIVE, *POSITIVE])


@dataclass(frozen=True)
class Candidate:
    """A product under test: `ring` holds what multiplies by copies of the same weight, `dense`; `bytes` are read per call."""

    name: str
    ring: list[Callable[[Tensor], Tensor]]
    bytes: int
    dense: Callable[[], Tensor]
    tolerance: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="out x in")
    parser.add_argument("--rows", default="1,8,64,512", help="rows of activations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="regular expression: names of candidates to time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = {
        "cpu": cpu_name(),
        "instruction_sets": list(library.instruction_sets()),
        "torch": torch.__version__,
        "threads": options.threads,
        "clock": "thread CPU time" if options.threads == 1 else "wall clock",
        "ring_bytes": RING_BYTES,
        "read_gigabytes_per_second": read_bandwidth(),
        "results": [],
    }
    for shape in options.shapes.split(","):
        rows, columns = (int(n) for n in shape.split("x"))
        candidates = list(make_candidates(rows, columns, options.only))
        for m in (int(n) for n in options.rows.split(",")):
            record["results"] += measure(
                candidates, (rows, columns), m, options.rounds, record["read_gigabytes_per_second"]
            )
            print(table(record["results"][-len(candidates) :]), flush=True)
        candidates.clear()  # gigabytes, which the next shape needs
    out = options.out or Path(__file__).parent / "results" / f"kernels-{slug(record['cpu'])}-{options.threads}t.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(out)


def measure(
    candidates: list[Candidate], shape: tuple[int, int], m: int, rounds: int, bandwidth: float
) -> list[dict[str, object]]:
    """One row per candidate, in rounds in which each takes its turn."""
    x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m))
    errors = {c.name: relative_error(c.ring[0](x), in_float64(x, c.dense())) for c in candidates}
    right = [c for c in candidates if errors[c.name] <= c.tolerance]
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {c.name: [] for c in right}
    turns = {c.name: cycle(c.ring) for c in right}
    order = random.Random(m)
    for _ in range(rounds if m < 256 else max(3, rounds // 3)):
        for c in order.sample(right, len(right)):
            work = next(turns[c.name])
            start = clock()
            work(x)
            times[c.name].append(clock() - start)
    base = statistics.median(times["fp32"])
    return [row(c, shape, m, errors[c.name], times.get(c.name), base, bandwidth) for c in candidates]


def row(
    c: Candidate, shape: tuple[int, int], m: int, error: float, times: list[float] | None, base: float, bandwidth: float
) -> dict[str, object]:
    """What is recorded of a candidate; no time where its result was off."""
    result: dict[str, object] = {"out": shape[0], "in": shape[1], "m": m, "name": c.name, "error": error}
    if times is None:
        return result | {"wrong": f"error above {c.tolerance:.0e}"}
    median = statistics.median(times)
    return result | {
        "median_ms": 1e3 * median,
        "fastest_ms": 1e3 * min(times),
        "slowest_ms": 1e3 * max(times),
        "ratio_to_fp32": base / median,
        "bandwidth_share": c.bytes / median / 1e9 / bandwidth,
    }


def table(results: list[dict[str, object]]) -> str:
    """The rows of one shape and batch, for reading."""
    first = results[0]
    lines = [
        f"\n{first['out']} x {first['in']}, m = {first['m']}",
        f"{'':32}{'ms':>9}{'x fp32':>9}{'of read':>9}{'error':>10}",
    ]
    for r in results:
        if "wrong" in r:
            lines.append(f"{r['name']:32}{'wrong: not timed':>27}{r['error']:>10.1e}")
        else:
            lines.append(
                f"{r['name']:32}{r['median_ms']:9.3f}{r['ratio_to_fp32']:9.2f}{r['bandwidth_share']:9.0%}{r['error']:10.1e}"
            )
    return "\n".join(lines)


# --- candidates ----------------------------------------------------------------------------------------------------


def make_candidates(rows: int, columns: int, only: str) -> Iterator[Candidate]:
    """fp32 first, then ours, then everyone else's, as far as `only` finds something in their names."""
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    yield Candidate("fp32", ring(lambda: linear(dense.clone()), dense.nbytes), dense.nbytes, lambda: dense, 1e-5)
    int3, int2 = rounded(dense, 3, GROUP), rounded(dense, 2, GROUP)
    int4, int8 = rounded(dense, 4, GROUP), rounded(dense, 8, columns)
    weights: dict[str, tuple[Weight, Activations]] = {
        "w4a8": (int4, "group"), "w4a32": (int4, "float"), "w8a8": (int8, "token"), "w8a32": (int8, "float"),
        "w3a8": (int3, "group"), "w3a32": (int3, "float"), "w2a8": (int2, "group"), "w2a32": (int2, "float"),
        "nf4": (nearest_in_table(dense), "float"),
        "w4a8 + 1% sparse": (with_residual(int4), "group"),
        "llm.int8, 0.5% columns": (with_columns(int8, dense), "token"),
    }  # fmt: skip
    for kernel in dispatch.KERNELS:
        for name, (weight, activations) in weights.items():
            full, need = f"{kernel.name.removeprefix('c-')} {name}", Need.of(weight, activations)
            slow = kernel.name in ("c-portable", "torch-dequantize")
            if not slow and re.search(only, full) and dispatch.refusal(kernel, need) is None:
                yield ours(full, kernel, weight, need)
    others = {
        "torch dynamic int8": lambda name: torch_dynamic_int8(name, int8),
        "torch int8 bf16": lambda name: torch_int8_bf16(name, int8),
        "onnxruntime int8 act.": lambda name: onnxruntime_int4(name, int4, level=4, tolerance=1e-2),
        "onnxruntime fp32 act.": lambda name: onnxruntime_int4(name, int4, level=1, tolerance=1e-5),
    }
    for name, make in others.items():
        if re.search(only, name):
            yield from make(name)


def ours(name: str, kernel: Kernel, weight: Weight, need: Need) -> Candidate:
    first = apart.prepare(kernel, weight, need)
    exact = kernel.tolerance <= 1e-5 and need.activations == "float"
    products = ring(lambda: apart.prepare(kernel, weight, need), size(first))
    return Candidate(name, products, size(first), weight.dequantize, 1e-5 if exact else 1e-2)


def torch_dynamic_int8(name: str, weight: Weight) -> Iterator[Candidate]:
    """torch's dynamic int8 product, 7 bits (`reduce_range`): with 8 it saturates silently on machines without VNNI."""
    scales, zeros = weight.scale.flatten().double(), torch.zeros(len(weight.scale), dtype=torch.long)
    codes = torch._make_per_channel_quantized_tensor((weight.codes.int() - 128).to(torch.int8), scales, zeros, 0)

    def make() -> Callable[[Tensor], Tensor]:
        packed = torch.ops.quantized.linear_prepack(codes, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, reduce_range=True)

    yield Candidate(name, ring(make, weight.codes.nbytes), weight.codes.nbytes, weight.dequantize, 3e-2)


def torch_int8_bf16(name: str, weight: Weight) -> Iterator[Candidate]:
    """torch's weight-only int8 product; only its bfloat16 form is quick."""
    stored, scales = (weight.codes.int() - 128).to(torch.int8), weight.scale.flatten().bfloat16()

    def make() -> Callable[[Tensor], Tensor]:
        own = stored.clone()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), own, scales).float()

    yield Candidate(name, ring(make, stored.nbytes), stored.nbytes, weight.dequantize, 1e-2)


def onnxruntime_int4(name: str, weight: Weight, level: int, tolerance: float) -> Iterator[Candidate]:
    """MatMulNBits; accuracy level 4 makes the activations int8, level 1 keeps them in float32."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return
    rows, columns = weight.shape
    nibbles = (weight.codes[:, ::2] | weight.codes[:, 1::2] << 4).view(rows, columns // GROUP, GROUP // 2)
    scales = weight.scale.float().flatten()
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=GROUP, accuracy_level=level,
    )  # fmt: skip
    inputs = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])
    outputs = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])
    constants = [numpy_helper.from_array(nibbles.numpy(), "codes"), numpy_helper.from_array(scales.numpy(), "scales")]
    graph = helper.make_graph([node], "product", [inputs], [outputs], constants)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()

    def make() -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    read = nibbles.nbytes + scales.nbytes
    yield Candidate(name, ring(make, read), read, weight.dequantize, tolerance)


# --- weights -------------------------------------------------------------------------------------------------------


def rounded(dense: Tensor, bits: int, group: int) -> Weight:
    """Symmetric rounding to nearest."""
    groups = dense.unflatten(1, (-1, group))
    scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).half()
    codes = (groups / scale.float().unsqueeze(-1)).round_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    return Weight(codes.flatten(1).to(torch.uint8), scale, None, bits, group)


def nearest_in_table(dense: Tensor) -> Weight:
    groups = dense.unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1)
    edges = (NF4[1:] + NF4[:-1]) / 2
    codes = torch.bucketize(groups / scale.unsqueeze(-1), edges).flatten(1).to(torch.uint8)
    return Weight(codes, scale, None, 4, 64, codebook=NF4)


def with_residual(weight: Weight) -> Weight:
    chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.01
    return Weight(weight.codes, weight.scale, None, 4, GROUP, residual=SparseRows.of(chosen * 0.1))


def with_columns(weight: Weight, dense: Tensor) -> Weight:
    columns = torch.arange(0, weight.shape[1], 200)
    return Weight(weight.codes, weight.scale, None, 8, weight.group, columns=columns, outliers=dense[:, columns].half())


# --- small things --------------------------------------------------------------------------------------------------


def ring(make: Callable[[], Callable[[Tensor], Tensor]], bytes_each: int) -> list[Callable[[Tensor], Tensor]]:
    return [make() for _ in range(max(2, RING_BYTES // bytes_each + 1))]


def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def in_float64(x: Tensor, weight: Tensor) -> Tensor:
    """The product of at most 8 rows."""
    return x[:8].double() @ weight.double().T


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y[: len(expected)].double() - expected).norm() / expected.norm())


def size(module: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())


def read_bandwidth() -> float:
    """Gigabytes per second of a loop that only reads: the best of five."""
    read = build.load(Path(__file__).with_name("stream.c")).read_stream
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    memory = torch.ones(RING_BYTES, dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        read(memory.data_ptr(), memory.nbytes)
        seconds.append(time.thread_time() - start)
    return memory.nbytes / min(seconds) / 1e9


def cpu_name() -> str:
    lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} family {facts.get('cpu family')} model {facts.get('model')}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()

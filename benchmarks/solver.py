"""Time GPTQ's solver on one layer against the textbook: same Hessian, same grid, interleaved, one thread.

    python benchmarks/solver.py [--size 4096] [--rounds 3] [--out benchmarks/results/solver.json]

The baseline is the algorithm as papers print it: Cholesky, inverse, Cholesky of the inverse, then a loop over columns of
the weight as it lies in memory, blocks of 128, lazy updates. Prints medians and the ratio of the medians of CPU time.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lmpress.calibrate.hessian import Hessian
from lmpress.compress.grid import Grid
from lmpress.compress.quantize.gptq import GPTQ, prepare, solve
from lmpress.compress.scheme import QuantArgs
from lmpress.compress.solver.loss import layer_loss


def textbook(weight: Tensor, hessian: Tensor, args: QuantArgs, damping: float, block: int = 128) -> Tensor:
    """The straightforward solver: returns the dequantized weight `[out, in]`."""
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    grid = Grid.fit(weight, args)
    weight, settled, width = weight.clone(), torch.zeros_like(weight), weight.shape[1]
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.zeros(weight.shape[0], stop - start)
        for j in range(start, stop):
            scale, zero = (t[:, j // args.columns_per_scale(width)] for t in (grid.scale, grid.zero))
            codes = torch.clamp(torch.round(weight[:, j] / scale) + zero, 0, args.maxq)
            settled[:, j] = scale * (codes - zero)
            errors[:, j - start] = (weight[:, j] - settled[:, j]) / upper[j, j]
            weight[:, j:stop] -= errors[:, j - start].unsqueeze(1) @ upper[j, j:stop].unsqueeze(0)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return settled


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU seconds of this thread, and the result."""
    start = time.thread_time()
    result = work()
    return time.thread_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/solver.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator, n = torch.Generator().manual_seed(0), options.size
    mixing = torch.randn(n, n, generator=generator) / n**0.5
    statistic = Hessian(n)
    statistic.update(torch.randn(2 * n, n, generator=generator) @ mixing, sequences=1)
    weight, args, config = torch.randn(n, n, generator=generator), QuantArgs(group_size=128), GPTQ(order="natural")
    hessian = statistic.matrix()

    def ours() -> Tensor:
        return solve(weight, prepare(hessian, args, config), args, config).tensor.dequantize()

    def baseline() -> Tensor:
        return textbook(weight, hessian, args, config.damping)

    times: dict[str, list[float]] = {"ours": [], "textbook": []}
    losses: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, work in (("ours", ours), ("textbook", baseline)):
            seconds, result = timed(work)
            times[name].append(seconds)
            losses[name] = layer_loss(weight - result, hessian)
    medians = {name: statistics.median(values) for name, values in times.items()}
    record = {
        "size": n,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": times,
        "median_seconds": medians,
        "ratio": medians["ours"] / medians["textbook"],
        "loss": losses,
    }
    print(json.dumps(record, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

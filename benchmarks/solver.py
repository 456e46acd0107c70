"""The time of GPTQ's solver on one layer, compared with the published algorithm: same Hessian, same grid, in turns, one thread.

    python benchmarks/solver.py [--size 4096] [--rounds 3] [--out benchmarks/results/solver.json]

The baseline is the algorithm as the papers print it: Cholesky, inverse, Cholesky of the inverse, then a loop over the columns
of the weight in their memory layout, blocks of 128, lazy updates. Prints medians and the ratio of the medians of CPU time.

`--quality balanced` is compared with `fast` in the same rounds, on the same Hessian with a drift: the solver alone (factor,
target, grid, sweep, descent), and the whole layer as in a run, including the comparison with rounding.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lmpress.calibrate.statistics.drift import Drift
from lmpress.calibrate.statistics.hessian import Hessian
from lmpress.compress.block import Block, Linear
from lmpress.compress.methods.quantize.gptq import GPTQ, PRESETS, apply, prepare, solve
from lmpress.compress.solver.loss import layer_loss
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.scheme import QuantArgs, Scheme


def textbook(weight: Tensor, hessian: Tensor, args: QuantArgs, damping: float, block: int = 128) -> Tensor:
    """The published solver: returns the dequantized weight `[out, in]`."""
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    grid = Grid.fit(weight, args)
    weight, quantized, width = weight.clone(), torch.zeros_like(weight), weight.shape[1]
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.zeros(weight.shape[0], stop - start)
        for j in range(start, stop):
            scale, zero = (t[:, j // args.columns_per_scale(width)] for t in (grid.scale, grid.zero))
            codes = torch.clamp(torch.round(weight[:, j] / scale) + zero, 0, args.maxq)
            quantized[:, j] = scale * (codes - zero)
            errors[:, j - start] = (weight[:, j] - quantized[:, j]) / upper[j, j]
            weight[:, j:stop] -= errors[:, j - start].unsqueeze(1) @ upper[j, j:stop].unsqueeze(0)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return quantized


def at_quality(quality: str, weight: Tensor, statistic: Hessian, drift: Drift) -> dict[str, Callable[[], Tensor]]:
    """The solver alone and the whole layer, with the options of a quality."""
    options = dict(PRESETS[quality])
    args = QuantArgs(group_size=128, observer=options.pop("observer", "minmax"))
    config = GPTQ(scheme=Scheme(args), **options)
    hessian = statistic.matrix()

    def solver() -> Tensor:
        prepared = prepare(hessian, args, config)
        target = prepared.drift_target(drift, config.drift)
        return solve(weight, prepared, args, config, target).tensor.dequantize()

    def layer() -> Tensor:
        linear = Linear("layer", weight, args, statistic, drift)
        apply(config, Block("block", nn.Identity(), [linear]))
        assert linear.result is not None
        return linear.result.dequantize()

    return {quality: solver, f"{quality} layer": layer}


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

    drift = Drift(n, n, torch.float32)
    drift.update(0.01 * torch.randn(2 * n, n, generator=generator), torch.randn(2 * n, n, generator=generator), 1)
    works = {"ours": ours, "textbook": baseline}
    for quality in ("fast", "balanced"):
        works |= at_quality(quality, weight, statistic, drift)

    times: dict[str, list[float]] = {name: [] for name in works}
    losses: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, work in works.items():
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
        "balanced_over_fast": medians["balanced"] / medians["fast"],
        "balanced_over_fast_layer": medians["balanced layer"] / medians["fast layer"],
        "loss": losses,
    }
    print(json.dumps(record, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

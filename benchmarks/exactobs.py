"""The time of ExactOBS's elimination on one layer, compared with its floating-point operations, one thread.

    python benchmarks/exactobs.py [--size 512] [--rounds 3] [--out benchmarks/results/exactobs.json]

The floor: Lemma 1 on the columns that are left costs `(cols - k)^2` multiplications and additions in step `k` of a row, so
`rows * cols^3 / 3` for a full trace, at the speed of this thread's own matrix product of that size, measured in turns.
(Symmetric updates need half of that, but torch has no batched product for them.)
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from lmpress.compress.solver.obs_elimination import eliminate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exactobs.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, generator = options.size, torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * n, n, generator=generator) @ (torch.randn(n, n, generator=generator) / n**0.5)
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian.double()).float()
    weight = torch.randn(n, n, generator=generator)
    eliminate(weight[:8], inverse)
    seconds: dict[str, list[float]] = {"trace": [], "floor": []}
    for _ in range(options.rounds):
        start = time.thread_time()
        eliminate(weight, inverse)
        seconds["trace"].append(time.thread_time() - start)
        start = time.thread_time()
        for _ in range(10):
            hessian @ inverse
        per_operation = (time.thread_time() - start) / 10 / n**3
        seconds["floor"].append(per_operation * n * n**3 / 3)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["trace"] / medians["floor"]
    record = {"size": n, "torch": torch.__version__, "seconds": seconds, "median_seconds": medians, "ratio": ratio}
    print(json.dumps(record, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

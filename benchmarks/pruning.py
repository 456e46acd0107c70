"""The KL divergence of every pruning method, and the order of the methods by their loss on every layer.

    python benchmarks/pruning.py MODEL --calib train.jsonl --data test.jsonl [--out benchmarks/results/pruning.md]

Every row is one run of the pipeline with its defaults and dense output in the model's own dtype, so that only the zeros and
the updates count; the calibration rows are the same for all. The second table solves each layer of the dense model on the
same inputs, and counts the layers in which a method is worse than the one that should be worse.
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from lmpress import evaluate, prune
from lmpress.calibrate.data.token_rows import calibration_rows
from lmpress.calibrate.model.architecture import find_linears, weight_of
from lmpress.calibrate.model.skeleton import build
from lmpress.calibrate.runner import Runner
from lmpress.compress.formats.source import open_source
from lmpress.compress.formats.tokenizer import load_tokenizer
from lmpress.compress.methods.prune import exactobs, magnitude, sparsegpt, wanda
from lmpress.compress.solver.damped_hessian import damp
from lmpress.compress.solver.loss import layer_loss
from lmpress.compress.solver.masked_lstsq import masked_lstsq
from lmpress.recipes.scheme import PruneArgs

RUNS = {
    "magnitude": ("magnitude", {}),
    "obd": ("obd", {}),
    "wanda": ("wanda", {}),
    "wanda, refit": ("wanda", {"refit": True}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt, refit": ("sparsegpt", {"refit": True}),
    "obs, blocks of 64": ("obs", {}),
    "exactobs as published": ("exactobs", {"drift": 0.0, "true_sequential": False, "compare": False}),
    "exactobs": ("exactobs", {}),
}
AMOUNTS = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}, "4:8": {"pattern": "4:8"}}


def divergences(options: argparse.Namespace) -> list[str]:
    """A table of KL (nats per token) and seconds, relative to SparseGPT."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, (method, extra) in RUNS.items():
        for amount, how in AMOUNTS.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                out = Path(folder) / "out"
                prune(
                    options.model, out, method=method, **how, calib=options.calib, samples=options.samples,
                    seq_len=options.length, options=extra,
                )  # fmt: skip
                seconds = time.process_time() - start
                kl = evaluate(out, options.data, seq_len=options.length, rows=options.rows, against=options.model).kl
            found.setdefault(name, {})[amount] = (kl, seconds)
            print(f"{name:24} {amount:5} KL {kl:.4f}  {seconds:6.1f} s", flush=True)
    base = found["sparsegpt"]
    lines = ["| method | " + " | ".join(AMOUNTS) + " | CPU seconds (50 %) |", "|---" * (len(AMOUNTS) + 2) + "|"]
    for name, row in found.items():
        cells = [f"{kl:.3f} ({kl / base[amount][0]:.2f})" for amount, (kl, _) in row.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['50 %'][1]:.1f} |")
    return lines


def order_of_losses(options: argparse.Namespace) -> list[str]:
    """How often `1/2 tr(D H D^T)` of a method exceeds that of the next one, over all layers of the dense model."""
    source = open_source(options.model)
    rows = calibration_rows(options.calib, load_tokenizer(source.path), options.samples, options.length)
    names = ["exactobs", "sparsegpt, refit", "sparsegpt", "wanda", "magnitude"]
    wrong = {amount: dict.fromkeys(names[1:], 0) for amount in AMOUNTS}
    worst = dict.fromkeys(AMOUNTS, 0.0)
    layers = 0
    with tempfile.TemporaryDirectory() as scratch:
        runner = Runner(build(source), source, rows, Path(scratch))
        runner.capture()
        for index in range(len(runner.blocks)):
            linears = find_linears(runner.load(index))
            statistics = runner.collect(index, set(linears), torch.float64)
            for name, linear in linears.items():
                layers += 1
                hessian = damp(statistics.hessians[name].matrix(), 0.01)
                for amount, how in AMOUNTS.items():
                    losses = _losses(weight_of(linear).double(), hessian, PruneArgs(**how))
                    for better, worse in pairwise(losses):
                        wrong[amount][names[losses.index(worse)]] += better > worse
                    worst[amount] = max(worst[amount], losses[0] / losses[1])
            if index + 1 < len(runner.blocks):
                runner.forward(index)
            runner.unload(index)
    lines = ["| amount | " + " | ".join(f"worse than {name}" for name in names[1:]) + " | exactobs / refit, largest |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for amount, counts in wrong.items():
        cells = [f"{count} of {layers}" for count in counts.values()]
        lines.append(f"| {amount} | " + " | ".join(cells) + f" | {worst[amount]:.3f} |")
    return lines


def _losses(weight, hessian, args) -> list[float]:  # noqa: ANN001
    """Losses under the damped Hessian, in the expected order of the methods, best first."""
    rows = args if args.pattern else PruneArgs(args.sparsity, scope="row")  # Wanda's comparison, for magnitude too
    swept, mask = sparsegpt.prune(weight, hessian, args)
    results = [
        exactobs.prune(weight, hessian, args)[0],
        masked_lstsq(weight, hessian.matrix, mask, start=swept),
        swept,
        wanda.prune(weight, hessian, rows)[0],
        magnitude.prune(weight, hessian, rows)[0],
    ]
    return [layer_loss(weight - result, hessian.matrix) for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pruning.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    order = order_of_losses(options)
    print("\n".join(order), flush=True)
    title = (
        f"# Pruning {Path(options.model).name}: KL to the original in nats per token (ratio to SparseGPT's)\n\n"
        f"Calibration {options.samples} x {options.length} tokens of {Path(options.calib).name}, seed 0; evaluation "
        f"{options.rows} x {options.length} tokens of {Path(options.data).name}; torch {torch.__version__}, 1 thread.\n"
    )
    second = "\n## Order of the damped losses on the same inputs: how often a method is worse than the next\n"
    text = "\n".join([title, *divergences(options), second, *order]) + "\n"
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)


if __name__ == "__main__":
    main()

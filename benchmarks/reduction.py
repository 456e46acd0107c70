"""What fewer layers and narrower blocks cost in perplexity, and what a training brings back.

    python benchmarks/reduction.py MODEL [--data python-stdlib] [--steps 500] [--out benchmarks/results/reduction.md]

Every choice of layers with `--drop` of them gone, then the MLP at `--mlp-width` with and without refit, then half of the
key-value heads, all untrained and on the same rows; with `--steps` the greedy choice is trained as well.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from lmpress import distill, evaluate
from lmpress.calibrate.rows import calibration_rows, load_tokenizer
from lmpress.compress.reduce.choice import CHOICES
from lmpress.compress.reduce.width import Width, narrow


def rows_of(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    """Each reduced model: what it is called, and where it lies."""
    common = {"data": options.data, "samples": options.samples, "seq_len": options.length}
    for choice in CHOICES:
        out = folder / choice
        made = distill(options.model, out, drop=options.drop, choice=choice, options={"steps": 0}, **common)
        yield f"layers {', '.join(map(str, made.kept))} ({choice})", out
    rows = calibration_rows(options.data, load_tokenizer(options.model), options.samples, options.length)
    heads = AutoConfig.from_pretrained(options.model).num_key_value_heads
    mlp = Width(mlp=options.mlp_width)
    widths = {
        f"MLP at {options.mlp_width:g}, refitted": mlp,
        f"MLP at {options.mlp_width:g}, only taken out": replace(mlp, refit=False),
        f"{max(1, heads // 2)} of {heads} key-value heads, refitted": Width(kv_heads=max(1, heads // 2)),
    }
    for number, (name, width) in enumerate(widths.items()):
        narrow(options.model, folder / f"width-{number}", width, rows)
        yield name, folder / f"width-{number}"
    if options.steps:
        out, common["samples"] = folder / "taught", options.lessons
        distill(options.model, out, drop=options.drop, choice="greedy", options={"steps": options.steps}, **common)
        yield f"greedy, then {options.steps} steps of distillation", out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="python-stdlib")
    parser.add_argument("--drop", type=float, default=0.25)
    parser.add_argument("--mlp-width", type=float, default=0.67)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--lessons", type=int, default=4096, help="rows of the training")
    parser.add_argument("--samples", type=int, default=64, help="rows of the calibration")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=24, help="rows of the evaluation")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reduction.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| model | perplexity | KL to the whole | CPU seconds |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        for name, out in rows_of(options, Path(folder)):
            seconds = time.process_time() - started
            found = evaluate(out, options.data, seq_len=options.length, rows=options.rows, against=options.model)
            if len(lines) == 2:
                lines.append(f"| whole | {found.perplexity_base:.2f} | 0 | |")
            lines.append(f"| {name} | {found.perplexity:.2f} | {found.kl:.4f} | {seconds:.1f} |")
            print(lines[-1], flush=True)
            started = time.process_time()
    title = (
        f"# Fewer layers and channels: {Path(options.model).name}\n\n{options.rows} x {options.length} held-out tokens of "
        f"{Path(options.data).name}, calibration {options.samples} x {options.length}; torch {torch.__version__}, 1 thread.\n"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join([title, *lines]) + "\n")


if __name__ == "__main__":
    main()

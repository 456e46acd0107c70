"""Every method on two real models: perplexity, divergence, size and time, the figures of README's table of methods.

    python benchmarks/methods.py STORIES CALIB HELDOUT [--only NAME ...] [--out benchmarks/results/methods]

STORIES is the folder of stories260K, CALIB and HELDOUT its texts; the other model is the bundled sample. Each line is what
the command line of its first column does, with groups of 32 where a method has groups, 64 calibration rows of 256 tokens,
seed 0, one thread; evaluated on 32 held-out rows. Writes a table and the JSON behind it after every line; lines that `--only`
leaves out stay as they were.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lmpress

SAMPLE = Path(__file__).parents[1] / "examples" / "sample_model"
SAMPLES, LENGTH, EVALUATED = 64, 256, 32
Run = Callable[..., Any]


def quantize(method: str, **words: Any) -> Run:
    return partial(lmpress.quantize, method=method, **words)


def prune(method: str, **words: Any) -> Run:
    return partial(lmpress.prune, method=method, **words)


G32 = {"group_size": 32}
RUNS: dict[str, Run] = {
    "quantize --method rtn": quantize("rtn", **G32),
    "quantize --method gptq --quality fast": quantize("gptq", quality="fast", **G32),
    "quantize --method gptq": quantize("gptq", **G32),
    "quantize --method gptq --quality best": quantize("gptq", quality="best", **G32),
    "quantize --method obq": quantize("obq", **G32),
    "quantize --method awq": quantize("awq", **G32),
    "quantize --method rotate": quantize("rotate", **G32),
    "quantize --method nf4": quantize("nf4"),
    "quantize --method spqr": quantize("spqr"),
    "quantize --method gptq --average-bits 4.5": quantize("gptq", average_bits=4.5, **G32),
    "quantize --method zeroquant": quantize("zeroquant"),
    "quantize --method smoothquant": quantize("smoothquant"),
    "quantize --method llm-int8": quantize("llm-int8"),
    "prune --method magnitude": prune("magnitude"),
    "prune --method wanda": prune("wanda"),
    "prune --method sparsegpt": prune("sparsegpt"),
    "prune --method obd": prune("obd"),
    "prune --method obs": prune("obs"),
    "prune --method exactobs": prune("exactobs"),
    "prune --method exactobs --pattern 2:4": prune("exactobs", pattern="2:4"),
    "prune --method exactobs --pattern 1x4": prune("exactobs", pattern="1x4"),
}


@dataclass(frozen=True)
class Row:
    """One compressed model: `original` is the original's perplexity, `share` the size of the weight files over its."""

    model: str
    command: str
    original: float
    perplexity: float
    kl: float
    bits: float
    share: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path)
    parser.add_argument("calib")
    parser.add_argument("heldout")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=RUNS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/methods"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = options.out.with_suffix(".json")
    rows = {
        (row["model"], row["command"]): Row(**row) for row in (json.loads(kept.read_text()) if kept.exists() else [])
    }
    for model, calib, heldout in (
        (options.stories, options.calib, options.heldout),
        (SAMPLE, "python-stdlib", "python-stdlib"),
    ):
        for command in options.only:
            row = rows[model.name, command] = measure(model, command, calib, heldout)
            print(line(row), end="", flush=True)
            ordered = sorted(rows.values(), key=lambda row: (row.model == SAMPLE.name, list(RUNS).index(row.command)))
            kept.write_text(json.dumps([asdict(row) for row in ordered], indent=2) + "\n")
            options.out.with_suffix(".md").write_text(table(ordered))


def measure(model: Path, command: str, calib: str, heldout: str) -> Row:
    """Compress and evaluate."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        report = RUNS[command](model, Path(folder) / "out", calib=calib, samples=SAMPLES, seq_len=LENGTH)
        seconds = time.monotonic() - started
        found = lmpress.evaluate(report.out, heldout, seq_len=LENGTH, rows=EVALUATED, against=model)
    assert found.kl is not None
    share = report.bytes_after / report.bytes_before
    return Row(
        model.name,
        command,
        found.perplexity_base or 0.0,
        found.perplexity,
        found.kl,
        report.bits_per_weight,
        share,
        seconds,
    )


def table(rows: list[Row]) -> str:
    """Markdown: a line per run."""
    columns = ("model", "command", "original", "perplexity", "KL", "bits a weight", "size", "seconds")
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n" + "".join(map(line, rows))


def line(row: Row) -> str:
    """One line of the table."""
    figures = f"{row.original:.3f} | {row.perplexity:.3f} | {row.kl:.5f} | {row.bits:.2f} | {row.share:.0%} | {row.seconds:.0f}"
    return f"| {row.model} | `{row.command}` | {figures} |\n"


if __name__ == "__main__":
    main()

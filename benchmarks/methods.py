"""Every method on two trained models: perplexity, KL divergence, size and time; docs/measurements.md shows the table.

    python benchmarks/methods.py STORIES CALIB HELDOUT [--only NAME ...] [--model stories] [--out benchmarks/results/methods]

STORIES is the folder of stories260K, CALIB and HELDOUT its texts; the other model is the bundled sample model. Each row is the
command line in its first column, with groups of 32 if the method has groups, 64 calibration rows of 256 tokens, seed 0, one
thread. stories260K is evaluated on 64 held-out rows of 256 tokens, the sample model on 32. The table and its JSON are written
after every row; rows that `--only` or `--model` leaves out stay as they were.
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
SAMPLES, LENGTH = 64, 256
STORIES_ROWS, SAMPLE_ROWS = 64, 32  # held-out rows of 256 tokens
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
    """One compressed model: `original` is the perplexity of the original, `share` its size relative to the original's."""

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
    parser.add_argument("--model", choices=["stories", "sample"], help="this model only (default: both)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/methods"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept = options.out.with_suffix(".json")
    rows = {
        (row["model"], row["command"]): Row(**row) for row in (json.loads(kept.read_text()) if kept.exists() else [])
    }
    runs = {
        "stories": (options.stories, options.calib, options.heldout, STORIES_ROWS),
        "sample": (SAMPLE, "python-stdlib", "python-stdlib", SAMPLE_ROWS),
    }
    for model, *data in [runs[name] for name in runs if options.model in (None, name)]:
        for command in options.only:
            row = rows[model.name, command] = measure(model, command, *data)
            print(line(row), end="", flush=True)
            ordered = sorted(rows.values(), key=lambda row: (row.model == SAMPLE.name, list(RUNS).index(row.command)))
            kept.write_text(json.dumps([asdict(row) for row in ordered], indent=2) + "\n")
            options.out.with_suffix(".md").write_text(table(ordered))


def measure(model: Path, command: str, calib: str, heldout: str, evaluated: int) -> Row:
    """Compress with 64 rows of `calib`, evaluate on `evaluated` rows of `heldout`."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        report = RUNS[command](model, Path(folder) / "out", calib=calib, samples=SAMPLES, seq_len=LENGTH)
        seconds = time.monotonic() - started
        found = lmpress.evaluate(report.out, heldout, seq_len=LENGTH, rows=evaluated, against=model)
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
    """Markdown: one row per run."""
    columns = ("model", "command", "original", "perplexity", "KL", "bits per weight", "size", "seconds")
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n" + "".join(map(line, rows))


def line(row: Row) -> str:
    """One row of the table."""
    figures = f"{row.original:.3f} | {row.perplexity:.3f} | {row.kl:.5f} | {row.bits:.2f} | {row.share:.0%} | {row.seconds:.0f}"
    return f"| {row.model} | `{row.command}` | {figures} |\n"


if __name__ == "__main__":
    main()

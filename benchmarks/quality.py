"""KL divergence of every quality to the fp32 model, as a fraction of that of plain rounding at the same bits and group size.

    python benchmarks/quality.py MODELS DATA [--only NAME ...] [--qualities QUALITY ...] [--out benchmarks/results/quality]

MODELS and DATA are folders with the models and texts named in `SETS`; the sample model needs neither. Group 32, float16
scales, 128 calibration rows of 256 tokens, seed 0, one thread; evaluated on held-out rows. The table and its JSON
are written after every model. SpQR is compared with rounding at 4 bits asymmetric; its bits are those on disk.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import lmpress
from lmpress.recipes.methods import QUALITIES

SAMPLE = Path(__file__).parents[1] / "examples" / "sample_model"
# Model -> (calibration, held-out text, tokens per row, calibration rows, evaluated rows).
STORIES = ("tinystories/train.jsonl", "tinystories/test.jsonl", 256, 128, 64)
SETS = {
    "stories260K": STORIES,
    "babyllama-105": STORIES,
    "babygpt-shakespeare-gpt2": ("tinyshakespeare/train.txt", "tinyshakespeare/test.txt", 64, 512, 256),
    "sample_model": ("python-stdlib", "python-stdlib", 256, 128, 64),
}
GRIDS = ((4, True), (4, False), (3, False), (2, False))
METHODS = (("gptq", "fast"), ("gptq", "balanced"), ("gptq", "best"))


@dataclass(frozen=True)
class Row:
    """One compressed model: `ratio` is its KL over that of rounding, `bits` those on disk per quantized weight."""

    model: str
    grid: str
    method: str
    quality: str
    bits: float
    kl: float
    ratio: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--qualities", nargs="*", default=list(QUALITIES), choices=QUALITIES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        rows += measure(name, options.models, options.data, options.qualities)
        options.out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        options.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def measure(name: str, models: Path, data: Path, qualities: list[str]) -> list[Row]:
    """All methods on one model, at the `qualities`; rounding is always included."""
    rows = []
    for bits, symmetric in GRIDS:
        spqr = (("spqr", "balanced"), ("spqr", "best")) if (bits, symmetric) == (4, False) else ()
        base = 0.0
        chosen = [("rtn", "fast"), *(pair for pair in (*METHODS, *spqr) if pair[1] in qualities)]
        for method, quality in chosen:
            row = compress(name, models, data, bits, symmetric, method, quality, base)
            base = base or row.kl
            rows.append(row)
            print(f"{row.model} {row.grid} {method} {quality}: {row.ratio:.3f}", flush=True)
    return rows


def compress(
    name: str, models: Path, data: Path, bits: int, symmetric: bool, method: str, quality: str, base: float
) -> Row:
    """Quantize and evaluate one model; `base` is the KL of rounding, 0 if this is the run of rounding."""
    calib, heldout, length, samples, evaluated = SETS[name]
    model = SAMPLE if name == "sample_model" else models / name
    calib, heldout = (text if text == "python-stdlib" else str(data / text) for text in (calib, heldout))
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "out", time.monotonic()
        report = lmpress.quantize(
            model,
            out,
            method=method,
            bits=bits,
            group_size=32,
            symmetric=symmetric,
            quality=quality,
            calib=calib,
            samples=samples,
            seq_len=length,
        )
        seconds = time.monotonic() - started
        kl = lmpress.evaluate(out, heldout, seq_len=length, rows=evaluated, against=model).kl
    assert kl is not None
    grid = f"{bits}-bit {'symmetric' if symmetric else 'asymmetric'}"
    return Row(name, grid, method, quality, report.bits_per_weight, kl, kl / (base or kl), seconds)


def table(rows: list[Row]) -> str:
    """Markdown: one row per method."""
    head = "| model | grid | method | quality | bits on disk | KL | of RTN's | seconds |\n|---|---|---|---|---|---|---|---|\n"
    return head + "".join(
        f"| {r.model} | {r.grid} | {r.method} | {r.quality} | {r.bits:.3f} | {r.kl:.5f} | {r.ratio:.3f} | {r.seconds:.1f} |\n"
        for r in rows
    )


if __name__ == "__main__":
    main()

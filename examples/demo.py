"""Quantize the sample model with GPTQ and by rounding, at 4 and 3 bits, and print what each costs.

make demo        or        python examples/demo.py [--out build/demo] [--rows 32] [--json FILE]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lmpress
from lmpress.compress.command.console import print_report, size, watching
from lmpress.eval.tables import named_table

MODEL = Path(__file__).parent / "sample_model"
DATA, LENGTH = "python-stdlib", 256
TITLES = ("checkpoint", "weights", "bits\nper\nweight", "perplexity", "KL to\nbase", "same\nnext\ntoken", "seconds")
RUNS = [("gptq", 4), ("rtn", 4), ("gptq", 3), ("rtn", 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the checkpoints")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of 256 tokens to evaluate on")
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    console, base = Console(), lmpress.load(MODEL)
    first = lmpress.evaluate(base, DATA, rows=options.rows, seq_len=LENGTH)
    weights = size(sum(file.stat().st_size for file in MODEL.glob("*.safetensors")))
    rows = [(MODEL.name, weights, "16", f"{first.perplexity:.3f}")]
    for method, bits in RUNS:
        out = options.out / f"sample-{method}-w{bits}"
        console.rule(f"compress quantize --method {method} --bits {bits}")
        with watching(console) as observer:
            report = lmpress.quantize(
                MODEL, out, method=method, bits=bits, samples=64, seq_len=512, overwrite=True, observer=observer
            )
            found = lmpress.evaluate(out, DATA, rows=options.rows, seq_len=LENGTH, against=base, progress=observer)
        print_report(console, report)
        figures = (f"{report.bits_per_weight:.2f}", f"{found.perplexity:.3f}", f"{found.kl:.4f}")
        rest = (f"{found.top1_agreement:.1%}", f"{report.seconds:.1f}")
        rows.append((out.name, size(report.bytes_after), *figures, *rest))
    console.print(comparison(rows, first.protocol))
    if options.json:
        options.json.write_text(json.dumps({"protocol": first.protocol, "rows": rows}, indent=1) + "\n")


def comparison(rows: Sequence[Sequence[str]], protocol: str) -> Table:
    """The `rows` under `TITLES`, names whole on a terminal of 80 columns; the caption is the protocol of the evaluation."""
    table = named_table(TITLES, [row[0] for row in rows], protocol)
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    main()

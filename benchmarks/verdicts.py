"""The figures behind the bounds of a verdict: trained models, rounded and pruned from harmless to ruined.

    python benchmarks/verdicts.py MODEL=TEXT [MODEL=TEXT ...] [--out benchmarks/results/verdicts.json]

TEXT is a file, python-stdlib or a data set of the Hub: the text that the model was trained to predict. Every run is RTN or
magnitude pruning on all layers, which need no calibration; the figures are those of the run's own verdict.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
import transformers

import lmpress
from lmpress.compress.run import RunReport

BITS, SPARSITIES = (8, 4, 3, 2), (0.3, 0.5, 0.7, 0.95)


def runs(model: Path, text: str, out: Path) -> list[tuple[str, RunReport]]:
    """The reports of every run on `model`, by a short name."""
    rounded = [
        (
            f"{bits} bits",
            lmpress.quantize(model, out, method="rtn", bits=bits, group_size=32, calib=text, overwrite=True),
        )
        for bits in BITS
    ]
    pruned = [
        (
            f"{sparsity:.0%} zeros",
            lmpress.prune(model, out, method="magnitude", sparsity=sparsity, calib=text, overwrite=True),
        )
        for sparsity in SPARSITIES
    ]
    return rounded + pruned


def main() -> None:
    """Measure, print a line per run, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL=TEXT")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "verdicts.json")
    options = parser.parse_args()
    rows = []
    for pair in options.models:
        model, _, text = pair.partition("=")
        with tempfile.TemporaryDirectory() as place:
            for name, report in runs(Path(model), text, Path(place) / "out"):
                if report.fidelity is None:
                    raise SystemExit(f"{model}: {report.verdict.reason}")
                row = {"model": Path(model).resolve().name, "run": name, "verdict": report.verdict.word}
                rows.append(row | report.fidelity.as_dict())
                print(json.dumps(rows[-1]), flush=True)
    found = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "processor": platform.machine(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

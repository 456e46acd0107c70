"""The effect of a transform before GPTQ at 3 bits: `awq` and `rotate`, on every model.

    python benchmarks/transforms.py MODELS DATA [--only NAME ...] [--out benchmarks/results/transforms]

MODELS and DATA as for `quality.py`. Weights of 3 bits in asymmetric groups of 32 with searched grids (`mse`), GPTQ otherwise as
published. KL divergence to the fp32 model on held-out rows. The table and its JSON are written after every model.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from quality import SAMPLE, SETS

import lmpress
from lmpress.recipes import schema

MODELS = {**SETS, "stories260K-outlier": SETS["stories260K"]}
WEIGHTS = {"bits": 3, "symmetric": False, "strategy": "group", "group_size": 32, "observer": "mse"}
TRANSFORMS: dict[str, list[dict[str, Any]]] = {
    "": [],
    "awq": [{"method": "awq", "clip": False}],
    "rotate": [{"method": "rotate"}],
}


@dataclass(frozen=True)
class Row:
    """One compressed model: `ratio` is its KL over that without the transform; both None if the model is refused."""

    model: str
    transform: str
    kl: float | None
    ratio: float | None
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/transforms"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in options.only:
        base = None
        for transform in TRANSFORMS:
            rows.append(measure(name, options.models, options.data, transform, base))
            base = rows[-1].kl if not transform else base
            print(line(rows[-1]), end="", flush=True)
        options.out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        options.out.with_suffix(".md").write_text(table(rows))


def measure(name: str, models: Path, data: Path, transform: str, base: float | None) -> Row:
    """Compress and evaluate one model; `base` is the KL without the transform, None if this is the run without."""
    calib, heldout, length, samples, evaluated = MODELS[name]
    model = SAMPLE if name == "sample_model" else models / name
    calib, heldout = (text if text == "python-stdlib" else str(data / text) for text in (calib, heldout))
    recipe = schema.build(
        {
            "passes": [*TRANSFORMS[transform], {"method": "gptq", "scheme": {"weights": WEIGHTS}}],
            "calibration": {"data": calib, "samples": samples, "seq_len": length},
        },
        "chains",
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            lmpress.run(model, out, recipe)
        except lmpress.UsageError as error:
            return Row(name, transform, None, None, error.message)
        kl = lmpress.evaluate(out, heldout, seq_len=length, rows=evaluated, against=model).kl
    assert kl is not None
    return Row(name, transform, kl, kl / (base or kl))


def table(rows: list[Row]) -> str:
    """Markdown: one row per model and transform."""
    return "| model | passes | KL | of GPTQ's alone |\n|---|---|---|---|\n" + "".join(map(line, rows))


def line(row: Row) -> str:
    """One row of the table."""
    passes = f"{row.transform} → gptq" if row.transform else "gptq"
    if row.kl is None:
        return f"| {row.model} | {passes} | refused: {row.note} | |\n"
    return f"| {row.model} | {passes} | {row.kl:.5f} | {row.ratio:.3f} |\n"


if __name__ == "__main__":
    main()

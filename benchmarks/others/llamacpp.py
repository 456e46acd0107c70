"""GPTQ on GGUF's grids compared with llama.cpp's quantizer: KL divergence at equal bytes, on one model.

    python benchmarks/others/llamacpp.py [--model examples/sample_model] [--data python-stdlib]

llama.cpp runs in an environment of its own below build/, created from the package index, and quantizes our export of the model:
every layer in the same block (`pure`), embedding and head in bfloat16, no importance matrix, which its Python package cannot
compute. lmpress reads both files and evaluates them on the same held-out rows.
"""

import argparse
import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from interop import SAMPLE, make

import lmpress
from cells import ENVIRONMENTS

SUPER = {"formula": "ggml", "scale_dtype": "super"}
# Block -> llama.cpp's number of the file type, and our options.
BLOCKS: dict[str, tuple[int, dict[str, Any]]] = {
    "Q4_0": (2, {"bits": 4, "group_size": 32}),
    "Q4_K": (14, {"bits": 4, "group_size": 32, "symmetric": False, "options": SUPER}),
    "Q6_K": (18, {"bits": 6, "group_size": 16, "options": SUPER}),
}
SAMPLES, LENGTH, EVALUATED = 128, 512, 32
THEIRS = """
import ctypes, sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.pure, parameters.nthread = int(sys.argv[3]), True, 1
parameters.token_embedding_type = parameters.output_tensor_type = 30  # bfloat16
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""


@dataclass(frozen=True)
class Row:
    """One file: `kl` to the original in nats per token, its standard error, perplexity, bytes."""

    block: str
    method: str
    kl: float
    error: float
    perplexity: float
    nbytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SAMPLE)
    parser.add_argument("--data", default="python-stdlib")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/llamacpp"))
    options = parser.parse_args()
    python = make(Path("build/llama.cpp"), ENVIRONMENTS["llama.cpp"].packages)
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        dense = lmpress.export(options.model, Path(folder) / "dense", format="gguf").out / "model.gguf"
        for block, (number, ours) in BLOCKS.items():
            theirs = Path(folder) / f"{block}.gguf"
            subprocess.run(
                [python, "-c", THEIRS, str(dense), str(theirs), str(number)], check=True, capture_output=True
            )
            rows.append(evaluated(block, "llama.cpp", theirs, options))
            for quality in ("fast", "balanced"):
                packed = Path(folder) / f"{block}-{quality}"
                calibration = {"calib": options.data, "samples": SAMPLES, "seq_len": LENGTH}
                lmpress.quantize(options.model, packed, method="gptq", quality=quality, **calibration, **ours)
                file = lmpress.export(packed, Path(f"{packed}-gguf"), format="gguf").out / "model.gguf"
                rows.append(evaluated(block, f"gptq {quality}", file, options))
            options.out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
            options.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def evaluated(block: str, method: str, file: Path, options: argparse.Namespace) -> Row:
    """Perplexity and divergence of a file."""
    found = lmpress.evaluate(file, options.data, seq_len=LENGTH, rows=EVALUATED, against=options.model)
    assert found.kl is not None and found.kl_stderr is not None
    row = Row(block, method, found.kl, found.kl_stderr, found.perplexity, file.stat().st_size)
    print(f"{block} {method}: {row.kl:.5f} +- {row.error:.5f}", flush=True)
    return row


def table(rows: list[Row]) -> str:
    """Markdown: one row per file."""
    lines = ["| block | quantized by | KL | standard error | of llama.cpp's | perplexity | bytes |", "|---" * 7 + "|"]
    base = {row.block: row.kl for row in rows if row.method == "llama.cpp"}
    for r in rows:
        figures = f"{r.kl:.5f} | {r.error:.5f} | {r.kl / base[r.block]:.2f} | {r.perplexity:.3f} | {r.nbytes}"
        lines.append(f"| {r.block} | {r.method} | {figures} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

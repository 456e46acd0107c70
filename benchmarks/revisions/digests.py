"""The SHA-256 of every weight file that a fixed list of commands writes, to check that two revisions write the same bytes.

    python benchmarks/revisions/digests.py --models stories260K examples/sample_model --out before.json
    python benchmarks/revisions/digests.py --models stories260K examples/sample_model --against before.json

Floating-point sums depend on the processor and the thread count, so compare files written on one machine with equal
`--threads`. A command that does not fit a model is refused, and must be refused with the same exit code. Exit code 1 if
anything differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

WEIGHTS = {".safetensors", ".gguf", ".onnx", ".data", ".xml", ".bin"}
SMALL = "--samples 16 --seq-len 128 --quiet"
TRAINING = "--steps 4 --batch 2 --checks 2 --samples 16 --seq-len 64 --quiet"
RECIPES = {
    "lkd": """
passes:
  - method: zeroquant
    scheme:
      weights: {bits: 4, symmetric: true, strategy: group, group_size: 32}
      inputs: {bits: 8, symmetric: true, strategy: token, group_size: null, formula: signed, dynamic: true}
  - {method: lkd}
calibration: {data: python-stdlib, samples: 8, seq_len: 64}
""",
    "lorc": """
passes:
  - method: gptq
    scheme: {weights: {bits: 3, symmetric: false, strategy: group, group_size: 32, observer: mse}}
  - {method: lorc, rank: 4}
calibration: {data: python-stdlib, samples: 8, seq_len: 64}
""",
    "static": """
passes:
  - {method: smoothquant}
  - method: rtn
    scheme:
      weights: {bits: 8, symmetric: true, strategy: channel, group_size: null, formula: signed}
      inputs: {bits: 8, symmetric: true, strategy: tensor, group_size: null, formula: signed, dynamic: false}
calibration: {data: python-stdlib, samples: 8, seq_len: 64}
""",
    "cache": """
passes:
  - method: gptq
    scheme:
      weights: {bits: 4, symmetric: true, strategy: group, group_size: 32}
      kv:
        keys: {bits: 4, symmetric: false, strategy: channel, group_size: null, formula: spqr, dynamic: false}
        values: {bits: 4, symmetric: false, strategy: group, group_size: 16, formula: spqr, dynamic: true}
calibration: {data: python-stdlib, samples: 8, seq_len: 64}
""",
    "q4k": """
passes:
  - method: gptq
    scheme: {weights: {bits: 4, symmetric: false, strategy: group, group_size: 32, formula: ggml, scale_dtype: super}}
calibration: {data: python-stdlib, samples: 8, seq_len: 64}
keep: ["*down_proj"]
""",
    "chain": """
stages:
  - distill:
      {drop: 1, choice: influence, mlp_width: 0.75, samples: 16, seq_len: 64, steps: 4, batch: 2, checks: 2}
  - compress:
      passes:
        - {method: awq, clip: false}
        - method: gptq
          scheme: {weights: {bits: 4, symmetric: true, strategy: group, group_size: 16}}
      calibration: {data: python-stdlib, samples: 8, seq_len: 64}
      embedding: {bits: 5, symmetric: true, strategy: group, group_size: 16, observer: mse}
  - export: {format: gguf}
""",
}
# Name -> words of the command; {model} is the model, and {NAME} the result of an earlier command.
COMMANDS = {
    "gptq": f"quantize {{model}} --bits 4 --group-size 32 {SMALL}",
    "gptq-fast": f"quantize {{model}} --bits 4 --group-size 32 --quality fast --set order=group {SMALL}",
    "best": "quantize {model} --bits 3 --group-size 32 --asymmetric --quality best --samples 8 --seq-len 64 --quiet",
    "rtn": f"quantize {{model}} --method rtn --bits 3 --group-size 32 --asymmetric {SMALL}",
    "spqr": f"quantize {{model}} --method spqr {SMALL}",
    "awq": f"quantize {{model}} --method awq --group-size 32 {SMALL}",
    "rotate": f"quantize {{model}} --method rotate --group-size 32 {SMALL}",
    "nf4": f"quantize {{model}} --method nf4 {SMALL}",
    "nf4-64": f"quantize {{model}} --method nf4 --group-size 64 {SMALL}",
    "llm-int8": f"quantize {{model}} --method llm-int8 {SMALL}",
    "obq": f"quantize {{model}} --method obq --group-size 32 --keep *mlp* {SMALL}",
    "average": f"quantize {{model}} --average-bits 4 --group-size 32 --quality fast {SMALL}",
    "exactobs": f"prune {{model}} --method exactobs --sparsity 0.5 --keep *mlp* {SMALL}",
    "sparsegpt": f"prune {{model}} --method sparsegpt --pattern 2:4 --format 2:4 {SMALL}",
    "wanda": f"prune {{model}} --method wanda --sparsity 0.5 --format bitmask {SMALL}",
    "obd": f"prune {{model}} --method obd --allocate {SMALL}",
    "distill": f"distill {{model}} --drop 1 --choice angular --kv-heads 2 {TRAINING}",
    "hidden": f"distill {{model}} --hidden-size 0.75 --lora 2 {TRAINING}",
    **{name: f"run {{model}} --recipe {name}.yaml --quiet" for name in RECIPES},
    "to-gptq": "export {gptq} --format gptq --quiet",
    "to-gptq-v2": "export {rtn} --format gptq_v2 --quiet",
    "to-awq": "export {awq} --format awq --quiet",
    "to-packed": "export {to-gptq} --format pack-quantized --quiet",
    "to-bnb": "export {nf4-64} --format bitsandbytes --quiet",
    "to-gguf": "export {gptq} --format gguf --quiet",
    "q4k-gguf": "export {q4k} --format gguf --quiet",
    "to-onnx": "export {gptq} --format onnx --quiet",
    "to-fp16": "export {gptq} --format fp16 --quiet",
}


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each weight file of `folder`."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in WEIGHTS)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(name: str, model: Path, folder: Path, threads: int) -> dict[str, str]:
    """Run the command called `name` on `model` into `folder`/name: the digests, or the exit code if it was refused."""
    folders = {other: str(folder / other) for other in COMMANDS}
    words = [word.format(model=model, **folders) for word in COMMANDS[name].split()]
    command = [sys.executable, "-m", "lmpress.cli", *words, "--out", str(folder / name)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: a verdict of BROKEN, which is a result too
        print(f"{name}: {' '.join(done.stderr.split())[:300]}", file=sys.stderr)
        return {"refused": str(done.returncode)}
    return digests(folder / name)


def results(model: Path, names: list[str], threads: int, workers: int) -> Iterator[tuple[str, dict[str, str]]]:
    """The digests of the commands called `names`, run `workers` at a time; an export waits for what it exports."""
    exports = [name for name in names if COMMANDS[name].startswith("export")]
    again = [name for name in exports if name == "to-packed"]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(workers) as pool:
        folder = Path(temporary)
        for name, text in RECIPES.items():
            (folder / f"{name}.yaml").write_text(text)
        first = [name for name in names if name not in exports]
        for batch in (first, [name for name in exports if name not in again], again):
            yield from zip(
                batch, pool.map(partial(run, model=model, folder=folder, threads=threads), batch), strict=True
            )


def main() -> int:
    """Run every command on every model, print the differences, and save the digests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    for model in options.models:
        for name, made in results(model.resolve(), options.only, options.threads, options.workers):
            found[f"{model.name}/{name}"] = made
            print(f"{model.name}/{name}", made, flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    before = json.loads(options.against.read_text()) if options.against else found
    different = [name for name, made in found.items() if before.get(name) != made]
    refused = [name for name, made in found.items() if "refused" in made]
    print(f"{len(found)} commands, {len(different)} differ {different}, {len(refused)} refused {refused}")
    return 1 if different or not all(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Memory and time of `compress export` on a random Llama of about 1 GB, format by format.

    python benchmarks/export.py [--folder build/random-llama] [--out benchmarks/results/export.json]

The model of `memory.py` is rounded to 8 bits, and to 4 for the format that holds no other width. The process is the real
command; its peak (`ru_maxrss`) is counted above the bare import of torch and transformers. Its seconds exclude that import,
and are compared with those of copying the bytes of the larger of checkpoint and export to the same disk (synced, as exports
are), at the median speed of all copies, because the speed of a shared disk varies. The goals: one shard and 300 MB, and three
times the copy.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from memory import BARE, CONFIG, MEASURE, make_model, peak_of

import lmpress
from lmpress.compress.output.record import WEIGHTS

# Name of a checkpoint -> how it is quantized.
GRIDS: dict[str, dict[str, Any]] = {
    "w8": {"method": "rtn", "bits": 8, "group_size": 32},
    "w8-rows": {"method": "rtn", "bits": 8, "group_size": -1},
    "w4": {"method": "rtn", "bits": 4, "group_size": 32},
}
FORMATS = {
    "pack-quantized": "w8",
    "gptq": "w8",
    "awq": "w4",
    "bitsandbytes": "w8-rows",
    "gguf": "w8",
    "onnx": "w8",
    "openvino": "w8",
    "bf16": "w8",
    "fp32": "w8",
}
CHUNK = 16 * 2**20
ALLOWANCE = 300 * 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/random-llama"))
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; medians count")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export.json"))
    options = parser.parse_args()
    if not options.folder.exists():
        make_model(options.folder, CONFIG)
    bare = peak_of(sys.executable, "-c", BARE)
    records = []
    for name in options.only:
        records.append(measured(name, quantized(options.folder, FORMATS[name]), bare, options.rounds))
        print(f"{name}: {records[-1]['seconds']:.1f} s, copy {records[-1]['copy_seconds']:.1f} s", flush=True)
    compare_with_copies(records)
    print("| format | from | checkpoint | export | above import | allowed | seconds | copy | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(map(line, records)))
    found = {"torch": torch.__version__, "machine": platform.machine(), "bare_import_bytes": bare, "exports": records}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


def quantized(folder: Path, grid: str) -> Path:
    """The checkpoint that is exported, created on first use."""
    path = folder.with_name(f"{folder.name}-{grid}")
    if not path.exists():
        lmpress.quantize(folder, path, **GRIDS[grid])
    return path


def measured(name: str, checkpoint: Path, bare: int, rounds: int) -> dict[str, Any]:
    """Export and copy in turns, so that other work on the machine affects both."""
    target = checkpoint.with_name(f"{checkpoint.name}-{name}")
    command = [sys.executable, "-m", "lmpress.cli", "export", str(checkpoint), "-o", str(target), "--format", name]
    peaks, seconds, copies = [], [], []
    for _ in range(rounds):
        report, peak = exported([*command, "--overwrite", "--quiet", "--json", "-"])
        peaks.append(peak)
        seconds.append(report["seconds"])
        larger = max((checkpoint, target), key=size)
        copies.append(copy(larger, checkpoint.with_name("copy")))
    shard = max(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    record = {
        "format": name,
        "from": checkpoint.name,
        "checkpoint_bytes": size(checkpoint),
        "export_bytes": size(target),
        "above_import_bytes": max(peaks) - bare,
        "allowed_bytes": shard + ALLOWANCE,
        "seconds": statistics.median(seconds),
        "copy_seconds": statistics.median(copies),
    }
    shutil.rmtree(target)
    return record


def compare_with_copies(records: list[dict[str, Any]]) -> None:
    """Add to every record its `ratio` to a copy of its bytes at the median speed."""
    copied = [max(record["checkpoint_bytes"], record["export_bytes"]) for record in records]
    speeds = [each / record["copy_seconds"] for each, record in zip(copied, records, strict=True)]
    for each, record in zip(copied, records, strict=True):
        record["ratio"] = record["seconds"] * statistics.median(speeds) / each


def exported(command: list[str]) -> tuple[dict[str, Any], int]:
    """The report of the command, and its peak memory in bytes."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], check=True, stdout=subprocess.PIPE, text=True)
    report, _, peak = done.stdout.rstrip().rpartition("\n")
    return json.loads(report), int(peak)


def copy(folder: Path, target: Path) -> float:
    """Seconds of copying the weight files of `folder`, chunk by chunk, synced to the disk."""
    started = time.monotonic()
    target.mkdir(exist_ok=True)
    for file in weights(folder):
        with file.open("rb") as source, (target / file.name).open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)
            sink.flush()
            os.fsync(sink.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def weights(folder: Path) -> list[Path]:
    """The files that hold the weights."""
    return [file for file in folder.iterdir() if file.suffix in WEIGHTS]


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in weights(folder))


def line(record: dict[str, Any]) -> str:
    """One row of the table."""
    megabytes = [f"{record[key] / 1e6:,.0f} MB" for key in ("checkpoint_bytes", "export_bytes", "above_import_bytes")]
    cells = [f"`{record['format']}`", record["from"], *megabytes, f"{record['allowed_bytes'] / 1e6:,.0f} MB"]
    times = [f"{record['seconds']:.1f}", f"{record['copy_seconds']:.1f}", f"{record['ratio']:.1f}"]
    return f"| {' | '.join([*cells, *times])} |"


if __name__ == "__main__":
    main()

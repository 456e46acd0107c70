"""Wall-clock and CPU seconds of whole commands, from process start to exit.

    python benchmarks/startup.py MODEL DATA [--rounds 3] [--out benchmarks/results/startup.json]

`MODEL` and `DATA` are a small model and its text, for example `models/stories260K` and `data/tinystories/train.jsonl`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(*arguments: str) -> dict[str, float]:
    """Wall-clock and CPU seconds of one run of the command."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "lmpress.cli", *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": time.perf_counter() - start, "cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/startup.json"))
    options = parser.parse_args()
    record: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-o", f"{folder}/out", "--group-size", "32", "--calib", options.data, "--seq-len", "256"]
        commands = {"help": ["--help"], "quantize": ["quantize", options.model, *flags, "--overwrite", "--quiet"]}
        for name, arguments in commands.items():
            runs = [timed(*arguments) for _ in range(options.rounds)]
            record[name] = {key: statistics.median(run[key] for run in runs) for key in ("wall", "cpu")}
    print(json.dumps(record, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

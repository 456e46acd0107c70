"""Tokens per second and memory of whole models: float32, our 4 bits, and llama.cpp's Q4_0 with the same codes and scales.

    python benchmarks/whole_models.py [--model FOLDER] [--work build/whole-models] [--llama PYTHON]
                                      [--out benchmarks/results/whole-models.json]

Without `--model` it is a random Llama of 1.1 B parameters, created on first use. It is rounded to 4 bits in groups of 32,
exported to GGUF, and timed by the code of `compress eval --speed`: models take turns; medians. llama.cpp runs in separate
processes before and after, in the interpreter `--llama`, which has llama-cpp-python; it reads and writes the same numbers of
tokens with as many threads. With one thread, times are CPU times, so that other work on the machine counts as little as
possible.
"""

import argparse
import json
import shutil
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from memory import make_model
from transformers import LlamaConfig

import lmpress
from lmpress.eval.timing import speed as timing
from lmpress.eval.timing.machine import cpu_name

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
ABOVE, SHARE = 300e6, 0.25  # the goal for memory: this share of the float32 model, plus this many bytes

# Runs in the other interpreter; the arguments are the file, tokens to read, tokens to write, threads, rounds.
LLAMA = r"""
import json, re, sys, time
from llama_cpp import Llama
file, prompt, answer, threads, rounds = sys.argv[1], *map(int, sys.argv[2:])
now = time.process_time if threads == 1 else time.perf_counter
model = Llama(file, n_ctx=prompt + answer + 8, n_batch=prompt, n_threads=threads, n_threads_batch=threads, verbose=False)
tokens, times = [(7 * i + 11) % model.n_vocab() for i in range(prompt)], []
for _ in range(rounds + 1):
    model.reset()
    start = now()
    model.eval(tokens)
    read = now()
    for i in range(answer):
        model.eval([tokens[i]])
    times.append((prompt / (read - start), answer / (now() - read)))
peak = int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"times": times[1:], "peak": peak}))
"""


def llama(python: str, file: Path) -> dict[str, Any]:
    """Tokens per second of `file` in llama.cpp in every round, and its peak memory in bytes."""
    numbers = [timing.PROMPT, timing.ANSWER, torch.get_num_threads(), timing.ROUNDS]
    command = [python, "-c", LLAMA, str(file), *map(str, numbers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def joined(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The medians over the rounds of all runs."""
    prefill, decode = zip(*(pair for run in runs for pair in run["times"]), strict=True)
    return {
        "prefill": statistics.median(prefill),
        "decode": statistics.median(decode),
        "peak_bytes": max(run["peak"] for run in runs),
    }


def measure(model: Path, work: Path, python: str | None) -> dict[str, Any]:
    """Compress `model` into `work` unless it is there already, and time all models."""
    packed, exported = work / f"{model.name}-w4", work / f"{model.name}-gguf"
    if not packed.exists():
        lmpress.quantize(model, packed, method="rtn", bits=4, group_size=32)
    if python and not exported.exists():
        lmpress.export(packed, exported, format="gguf")
    file = exported / "model.gguf"
    runs = [llama(python, file)] if python else []
    ours = [asdict(each) for each in timing.speed(packed, against=model)]
    runs += [llama(python, file)] if python else []
    base, exact = ours[0], ours[1]
    record = {
        "model": model.name,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ours": ours,
        "llama.cpp": joined(runs) if runs else None,
        "memory_goal_bytes": SHARE * base["weight_bytes"] + ABOVE,
        "memory_goal_met": exact["peak_bytes"] <= SHARE * base["weight_bytes"] + ABOVE,
    }
    if runs:
        other = joined(runs)
        record["decode_over_llama.cpp"] = {each["name"]: each["decode"] / other["decode"] for each in ours}
        record["prefill_over_llama.cpp"] = {each["name"]: each["prefill"] / other["prefill"] for each in ours}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/whole-models"))
    parser.add_argument("--llama", help="an interpreter with llama-cpp-python")
    parser.add_argument("--keep", action="store_true", help="keep the models for another run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/whole-models.json"))
    options = parser.parse_args()
    model = options.model or options.work / "random-llama-1b"
    if not model.exists():
        make_model(model, CONFIG)
    found = json.loads(options.out.read_text()) if options.out.exists() else []
    record = measure(model, options.work, options.llama)
    print(json.dumps(record, indent=2))
    same = ("model", "cpu", "threads")
    found = [each for each in found if any(each.get(name) != record[name] for name in same)] + [record]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    if not options.keep:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()

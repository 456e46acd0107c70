"""AutoRound and `--quality best` side by side: KL divergence to the fp32 model and time, on one model.

    python benchmarks/others/autoround.py MODEL CALIB HELDOUT [--grids 4s 4a 3a 2a]

AutoRound 0.16.1 runs in an environment of its own below build/, created from the package index, with its defaults except for
the settings made equal: groups of 32, float16 scales, float32 arithmetic, the same 128 calibration rows of 256 tokens, one
thread. Its result is dequantized and evaluated by lmpress, on 64 held-out rows. Seconds are CPU seconds without the loading of
libraries.

`best` is also measured with a third of its tuning steps, for comparison with AutoRound's shorter run.

AutoRound does not quantize matrices whose sides are not multiples of 32. To make it quantize the same layers as lmpress,
it gets the model with its MLPs widened by channels of zeros, which change nothing. If 32 is not a divisor, the last group
is shorter; ours have the size of the nearest divisor (stories260K: 43 columns), which costs fewer bits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

PACKAGES = "auto-round==0.16.1 py-cpuinfo==9.0.0"
GRIDS = {"4s": (4, True), "4a": (4, False), "3a": (3, False), "2a": (2, False)}
ITERATIONS = (50, 200)
OURS = {"rtn": ("rtn", "fast", None), "best, 100 steps": ("gptq", "best", 100), "best": ("gptq", "best", None)}
GROUP, SAMPLES, LENGTH, EVALUATED = 32, 128, 256, 64


@dataclass(frozen=True)
class Row:
    """One compressed model; `ratio` is its KL over that of plain rounding, `seconds` are CPU seconds."""

    model: str
    grid: str
    method: str
    kl: float
    ratio: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib")
    parser.add_argument("heldout")
    parser.add_argument("--grids", nargs="*", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/autoround"))
    options = parser.parse_args()
    from interop import make

    python = make(Path("build/autoround"), PACKAGES)
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for grid in options.grids:
        rows += measure(python, options.model, options.calib, options.heldout, *GRIDS[grid])
        options.out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        options.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def measure(python: str, model: Path, calib: str, heldout: str, bits: int, symmetric: bool) -> list[Row]:
    """Plain rounding, ours and AutoRound's on one grid."""
    import lmpress

    rows: list[Row] = []
    grid = f"{bits}-bit {'symmetric' if symmetric else 'asymmetric'}"

    def evaluate(out: Path, method: str, seconds: float) -> None:
        kl = lmpress.evaluate(out, heldout, seq_len=LENGTH, rows=EVALUATED, against=model).kl
        assert kl is not None
        rows.append(Row(model.name, grid, method, kl, kl / rows[0].kl if rows else 1.0, seconds))
        print(f"{grid} {method}: {kl:.5f} {rows[-1].ratio:.3f} {seconds:.1f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, (method, quality, steps) in OURS.items():
            started = time.process_time()
            lmpress.run(model, work / name, ours(calib, method, quality, steps, bits, symmetric))
            evaluate(work / name, name, time.process_time() - started)
        prepare(model, calib, work / "widened")
        for iterations in ITERATIONS:
            out = work / f"autoround-{iterations}"
            words = [str(work / "widened"), str(out), str(bits), str(int(symmetric)), str(iterations)]
            command = [python, __file__, TUNE, *words]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            evaluate(out, f"AutoRound, {iterations} iterations", float(done.stdout.split()[-1]))
    return rows


def ours(calib: str, method: str, quality: str, steps: int | None, bits: int, symmetric: bool) -> Any:
    """The recipe of `compress quantize --method M --quality Q`, with `steps` steps of tuning if given."""
    from lmpress.recipes import schema
    from lmpress.recipes.options.quantize import QuantizeOptions

    recipe = QuantizeOptions(
        method=method,
        quality=quality,
        bits=bits,
        group_size=GROUP,
        symmetric=symmetric,
        calib=calib,
        samples=SAMPLES,
        seq_len=LENGTH,
    ).recipe()
    document = yaml.safe_load(schema.dump(recipe))
    if steps is not None:
        document["passes"][-1]["steps"] = steps
    return schema.build(document, "autoround")


def prepare(model: Path, calib: str, out: Path) -> None:
    """Write the widened model and the calibration tokens for AutoRound."""
    from transformers import AutoModelForCausalLM

    from lmpress.calibrate.data.token_rows import calibration_rows
    from lmpress.compress.formats.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    width = original.config.intermediate_size
    extra = -width % GROUP
    original.config.intermediate_size = width + extra
    state = {name: _widened(name, weight, extra) for name, weight in original.state_dict().items()}
    widened = AutoModelForCausalLM.from_config(original.config, dtype=torch.float32)
    widened.load_state_dict(state)
    widened.save_pretrained(out)
    tokenizer.save_pretrained(out)
    rows = calibration_rows(calib, tokenizer, SAMPLES, LENGTH, seed=0)
    save_file({"ids": rows.ids.long().contiguous()}, out / "rows.safetensors.calibration")


def _widened(name: str, weight: Tensor, extra: int) -> Tensor:
    """The weight of the widened model: gate and up projections get rows of zeros, down projections columns of zeros."""
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return pad(weight, (0, 0, 0, extra))
    return pad(weight, (0, extra)) if name.endswith("down_proj.weight") else weight


TUNE = "--tune"


def tune(model: str, out: str, bits: str, symmetric: str, iterations: str) -> None:
    """Run in AutoRound's environment: quantize, write the dequantized model, print the CPU seconds."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    ids = load_file(f"{model}/rows.safetensors.calibration")["ids"]
    original: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    started = time.process_time()
    tuned, layers = AutoRound(
        original,
        tokenizer,
        bits=int(bits),
        group_size=GROUP,
        sym=bool(int(symmetric)),
        iters=int(iterations),
        dataset=list(ids.unsqueeze(1)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        amp=False,
        device_map="cpu",
    ).quantize()
    seconds = time.process_time() - started
    assert all(layer["bits"] == int(bits) for name, layer in layers.items() if name != "lm_head"), layers
    tuned.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(seconds)


def table(rows: list[Row]) -> str:
    """Markdown: one row per method."""
    head = "| model | grid | method | KL | of RTN's | seconds |\n|---|---|---|---|---|---|\n"
    return head + "".join(
        f"| {r.model} | {r.grid} | {r.method} | {r.kl:.5f} | {r.ratio:.3f} | {r.seconds:.1f} |\n" for r in rows
    )


if __name__ == "__main__":
    if sys.argv[1:2] == [TUNE]:
        tune(*sys.argv[2:])
    else:
        main()

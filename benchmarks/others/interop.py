"""Which runtime loads which format: every cell is loaded and compared in that runtime, in an environment of its own.

    make interop
    python benchmarks/others/interop.py [--only gptqmodel] [--docs docs/interop.md] [--readme README.md]
    python benchmarks/others/interop.py --pages --docs docs/interop.md --readme README.md

One environment per runtime is created below build/interop from the package index. It can import the packages of this one, so
that only what the runtime adds is downloaded. The sample model goes through every cell, stories260K (below $COMPRESS_ASSETS)
through one cell per format and runtime. Results are kept in benchmarks/results/interop.json; `--only` replaces those of its
environments, `--pages` runs nothing and writes the pages from the kept results.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lmpress
from cells import ENVIRONMENTS, WEIGHTS, Environment, Weights
from report import report, summary

SAMPLE = Path(__file__).parents[2] / "examples" / "sample_model"
RESULTS = Path(__file__).parents[1] / "results" / "interop.json"
STORIES = "stories260K"
BEGIN, END = "<!-- interop: written by make interop -->\n", "<!-- /interop -->\n"
CALIBRATION = {"samples": 16, "seq_len": 128}  # no cell depends on the activations, except that they must give scales


@dataclass(frozen=True)
class Result:
    """One cell: the result of loading `weights` of `model` in `format` by `runtime` in `environment`.

    verdict  proven, WRONG, refused (by the runtime, `reason` is its message), not written (by our export, likewise)
    steps    largest difference of a weight that the runtime computes with, in steps of its grid: 0 is equal bit for bit
    logits   largest difference of a logit in standard deviations, `kl` the divergence in nats per token
    """

    model: str
    weights: str
    format: str
    runtime: str
    environment: str
    verdict: str
    reason: str = ""
    steps: float | None = None
    logits: float | None = None
    kl: float | None = None
    versions: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ENVIRONMENTS, action="append", help="these environments (default: all)")
    parser.add_argument("--out", type=Path, default=Path("build/interop"), help="folder for environments and exports")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="write the matrix to this file too")
    parser.add_argument("--readme", type=Path, help="write one row per format into this file too")
    parser.add_argument("--pages", action="store_true", help="run nothing; write the pages from the kept results")
    options = parser.parse_args()
    results = [Result(**each) for each in json.loads(options.results.read_text())] if options.results.exists() else []
    if not options.pages:
        results = run(options, options.only or list(ENVIRONMENTS), results)
    write_pages([asdict(each) for each in results], options.docs, options.readme)


def run(options: argparse.Namespace, chosen: list[str], kept: list[Result]) -> list[Result]:
    """The results of the `chosen` environments with those of `kept` for the others, written after every cell."""
    started = time.monotonic()
    results = [each for each in kept if each.environment not in chosen and each.environment in ENVIRONMENTS]
    for name in chosen:
        environment = ENVIRONMENTS[name]
        python = make(options.out / "env" / name, environment.packages)
        for model in models():
            for kind, weights in environment.cells(first_only=model != SAMPLE):
                result = cell(name, environment, python, model, kind, weights, options.out)
                print(f"{int(time.monotonic() - started):5} s  {line(result)}", flush=True)
                results.append(result)
                results.sort(key=lambda each: list(ENVIRONMENTS).index(each.environment))
                options.results.parent.mkdir(parents=True, exist_ok=True)
                options.results.write_text(json.dumps([asdict(each) for each in results], indent=1) + "\n")
    return results


def write_pages(results: list[dict[str, Any]], docs: Path | None, readme: Path | None) -> None:
    """Print the page; write it to `docs`, and the short table between its markers in `readme`."""
    text = report(results)
    print(text)
    if docs:
        docs.write_text(text, encoding="utf-8")
    if readme:
        before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
        readme.write_text(before + BEGIN + summary(results) + END + rest.partition(END)[2], encoding="utf-8")


def models() -> list[Path]:
    """The sample model, and stories260K if it is there."""
    stories = Path(os.environ.get("COMPRESS_ASSETS", "")) / "models" / STORIES
    if stories.is_dir():
        return [SAMPLE, stories]
    print(f"{STORIES} is skipped: set COMPRESS_ASSETS to a folder that holds models/{STORIES}", flush=True)
    return [SAMPLE]


def make(folder: Path, packages: str) -> str:
    """The interpreter of an environment that has `packages` and can import those of this one."""
    python = folder / "bin" / "python"
    if not packages:
        return sys.executable
    if not python.exists():
        venv.create(folder, with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        base = folder / "lib" / version / "site-packages" / "base.pth"
        # A plain line would leave out the base's own .pth files, and with them an editable lmpress.
        base.write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *packages.split()]
    subprocess.run(command, check=True)
    return str(python)


def cell(name: str, environment: Environment, python: str, model: Path, kind: str, weights: str, out: Path) -> Result:
    """Quantize, export, and compare in the runtime."""
    made = WEIGHTS[weights]
    source = quantized(model, made, kind, out)
    described = (model.name, weights, kind, environment.runtime, name)
    exported = source
    if made.written_as != kind:
        exported, refusal = export(source, out / "export" / f"{source.name}-{kind}", kind, python)
        if refusal:
            return Result(*described, "not written", refusal)
    against = exported if made.rounded_by_export else source
    (found,) = lmpress.verify(exported, against=against, runtime=[environment.runtime], python=python).findings
    if found.outputs is None:
        return Result(*described, "refused", (found.error or "").replace(str(exported), "CHECKPOINT"))
    versions = ", ".join(f"{package} {number}" for package, number in found.versions.items() if package != "torch")
    verdict = "proven" if found.ok else "WRONG"
    reason = "" if found.ok else f"from block {found.block} on, {len(found.wrong_layers)} layers"
    return Result(*described, verdict, reason, found.steps, found.outputs.logits, found.outputs.kl, versions)


def export(source: Path, out: Path, kind: str, python: str) -> tuple[Path, str]:
    """The checkpoint in another format, written by the runtime's interpreter, and the error if it was not written."""
    command = [python, "-m", "lmpress.cli", "export", str(source), "-o", str(out), "--format", kind, "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return out, done.stderr.strip().splitlines()[-1] if done.returncode else ""


def quantized(model: Path, made: Weights, kind: str, out: Path) -> Path:
    """The checkpoint with these weights; layers whose shape no kernel of the format supports stay dense."""
    keep = made.keep(model.name, kind)
    source = out / "-".join([model.name, *made.slug.split(), *(["attention"] if keep else [])])
    if not source.exists():
        lmpress.quantize(model, source, keep=keep, **CALIBRATION, **made.options)
    return source


def line(result: Result) -> str:
    """One line of progress."""
    figures = "" if result.steps is None else f" {result.steps:.2g} steps, logits {result.logits:.2g}"
    label = f"{result.model}, {result.weights}, {result.format}, {result.environment}"
    return f"{label}: {result.verdict}{figures} {result.reason}"


if __name__ == "__main__":
    main()

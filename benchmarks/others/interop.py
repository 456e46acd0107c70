"""Which runtime serves which format: every cell is loaded and compared in that runtime, in an environment of its own.

    make interop
    python benchmarks/others/interop.py [--only gptqmodel] [--docs docs/interop.md] [--readme README.md]

An environment per runtime is made below build/interop from the package index. It sees the packages of this one, so that only
what the runtime adds is fetched. The sample model goes through every cell, stories260K (found below $COMPRESS_ASSETS) through
one for each format and runtime. Results are kept in benchmarks/results/interop.json; `--only` replaces those of its
environments.
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

import lmpress
from cells import ENVIRONMENTS, WEIGHTS, Environment, Weights
from report import report, summary

SAMPLE = Path(__file__).parents[2] / "examples" / "sample_model"
RESULTS = Path(__file__).parents[1] / "results" / "interop.json"
STORIES = "stories260K"
BEGIN, END = "<!-- interop: written by make interop -->\n", "<!-- /interop -->\n"
CALIBRATION = {"samples": 16, "seq_len": 128}  # activations matter to no cell beyond having scales at all


@dataclass(frozen=True)
class Result:
    """One cell: what became of `weights` of `model` in `format` under `runtime` in `environment`.

    verdict  proven, WRONG, refused (by the runtime, in the words of `told`), not written (by us, likewise)
    steps    largest difference of a served weight in steps of its grid: 0 is equal bit for bit
    logits   largest difference of a logit in standard deviations, `kl` the divergence in nats per token
    """

    model: str
    weights: str
    format: str
    runtime: str
    environment: str
    verdict: str
    told: str = ""
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
    parser.add_argument("--readme", type=Path, help="write the worst cell of every format into this file too")
    options = parser.parse_args()
    started, chosen = time.monotonic(), options.only or list(ENVIRONMENTS)
    results = [Result(**each) for each in json.loads(options.results.read_text())] if options.results.exists() else []
    results = [each for each in results if each.environment not in chosen and each.environment in ENVIRONMENTS]
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
    text = report([asdict(each) for each in results])
    print(text)
    if options.docs:
        options.docs.write_text(text)
    if options.readme:
        before, _, rest = options.readme.read_text().partition(BEGIN)
        options.readme.write_text(
            before + BEGIN + summary([asdict(each) for each in results]) + END + rest.partition(END)[2]
        )


def models() -> list[Path]:
    """The sample model, and stories260K where it is."""
    stories = Path(os.environ.get("COMPRESS_ASSETS", "")) / "models" / STORIES
    if stories.is_dir():
        return [SAMPLE, stories]
    print(f"{STORIES} is left out: set COMPRESS_ASSETS to a folder that holds models/{STORIES}", flush=True)
    return [SAMPLE]


def make(folder: Path, packages: str) -> str:
    """The interpreter of an environment with these packages on top of this one's."""
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
    """Quantize, export, and let the runtime speak."""
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
    told = "" if found.ok else f"from block {found.block} on, {len(found.wrong_layers)} layers"
    return Result(*described, verdict, told, found.steps, found.outputs.logits, found.outputs.kl, versions)


def export(source: Path, out: Path, kind: str, python: str) -> tuple[Path, str]:
    """The checkpoint in another format, written where the runtime's packages are, and why it is not."""
    command = [python, "-m", "lmpress.cli", "export", str(source), "-o", str(out), "--format", kind, "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return out, done.stderr.strip().splitlines()[-1] if done.returncode else ""


def quantized(model: Path, made: Weights, kind: str, out: Path) -> Path:
    """The checkpoint with these weights; what no kernel of the format has a shape for stays dense."""
    keep = made.keep(model.name, kind)
    source = out / "-".join([model.name, *made.slug.split(), *(["attention"] if keep else [])])
    if not source.exists():
        lmpress.quantize(model, source, keep=keep, **CALIBRATION, **made.options)
    return source


def line(result: Result) -> str:
    """A result for people who wait."""
    figures = "" if result.steps is None else f" {result.steps:.2g} steps, logits {result.logits:.2g}"
    place = f"{result.model}, {result.weights}, {result.format}, {result.environment}"
    return f"{place}: {result.verdict}{figures} {result.told}"


if __name__ == "__main__":
    main()

"""Which runtime serves which export: every cell is loaded and compared in that runtime, in an environment of its own.

make interop        or        python benchmarks/interop.py [--only gptqmodel] [--models DIR ...] [--docs docs/interop.md]

An environment per runtime is made below build/interop from the package index. It sees the packages of this one, so that only
what the runtime adds is fetched.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import lmpress

SAMPLE = Path(__file__).parents[1] / "examples" / "sample_model"
# Bits, symmetric, group size.
GRIDS = ((4, True, 32), (4, True, 128), (4, False, 32), (8, True, 128), (2, True, 32))
GPTQMODEL = (
    "gptqmodel==7.7.0 optimum==2.3.0 threadpoolctl device-smi pypcre tokenicer logbar defuser torchao ninja maturin "
    "requests urllib3 charset-normalizer certifi"
)


@dataclass(frozen=True)
class Environment:
    """A runtime's packages (installed as they stand, without what they would pull in), and the formats that it reads."""

    packages: str
    runtime: str
    formats: tuple[str, ...]


ENVIRONMENTS = {
    "compressed-tensors": Environment("", "transformers", ("pack-quantized",)),
    "gptqmodel": Environment(GPTQMODEL, "transformers", ("gptq", "gptq_v2", "awq")),
    "gguf": Environment("gguf==0.19.0", "gguf-transformers", ("gguf",)),
    "llama.cpp": Environment("llama-cpp-python==0.3.36 diskcache gguf==0.19.0", "llama.cpp", ("gguf",)),
    "onnxruntime": Environment(
        "onnx==1.23.2 onnxruntime==1.32.0 ml_dtypes protobuf flatbuffers", "onnxruntime", ("onnx",)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ENVIRONMENTS, action="append", help="these environments (default: all)")
    parser.add_argument("--models", type=Path, nargs="+", default=[SAMPLE], help="models to export")
    parser.add_argument("--out", type=Path, default=Path("build/interop"), help="folder for environments and exports")
    parser.add_argument("--docs", type=Path, help="write the matrix to this file too")
    options = parser.parse_args()
    lines = ["| model | weights | format | runtime | result |", "|---|---|---|---|---|"]
    print("\n".join(lines))
    for name in options.only or ENVIRONMENTS:
        python = make(options.out / "env" / name, ENVIRONMENTS[name].packages)
        for model in options.models:
            for grid in GRIDS:
                for line in cells(python, model, grid, ENVIRONMENTS[name], options.out):
                    print(line, flush=True)
                    lines.append(line)
    if options.docs:
        options.docs.parent.mkdir(parents=True, exist_ok=True)
        options.docs.write_text("# Formats and runtimes\n\nThe output of `make interop`.\n\n" + "\n".join(lines) + "\n")


def make(folder: Path, packages: str) -> str:
    """The interpreter of an environment with these packages on top of this one's."""
    python = folder / "bin" / "python"
    if not packages:
        return sys.executable
    if not python.exists():
        venv.create(folder, with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        base = folder / "lib" / version / "site-packages" / "base.pth"
        base.write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *packages.split()]
    subprocess.run(command, check=True)
    return str(python)


def cells(python: str, model: Path, grid: tuple[int, bool, int], environment: Environment, out: Path) -> list[str]:
    """A line of the matrix per format."""
    bits, symmetric, group = grid
    source = out / f"{model.name}-w{bits}-{'sym' if symmetric else 'asym'}-g{group}"
    if not source.exists():
        lmpress.quantize(model, source, method="rtn", bits=bits, symmetric=symmetric, group_size=group)
    weights = f"{bits} bits {'sym' if symmetric else 'asym'} g{group}"
    lines = []
    for kind in environment.formats:
        try:
            exported = lmpress.export(source, out / "export" / f"{source.name}-{kind}", format=kind, overwrite=True)
        except lmpress.UsageError as error:
            lines.append(f"| {model.name} | {weights} | {kind} | {environment.runtime} | refused: {error.message} |")
            continue
        told = verified(python, exported.out, source, environment.runtime)
        lines.append(f"| {model.name} | {weights} | {kind} | {environment.runtime} | {told} |")
    return lines


def verified(python: str, exported: Path, source: Path, runtime: str) -> str:
    """What `compress verify` found, in words."""
    command = [python, "-m", "lmpress.cli", "verify", str(exported), "--against", str(source), "--runtime", runtime]
    done = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        return f"not run: {done.stderr.strip().splitlines()[-1]}"
    finding = json.loads(done.stdout[done.stdout.index("{") :])["findings"][0]
    if finding["error"]:
        return f"fails: {finding['error']}"
    versions = ", ".join(f"{name} {number}" for name, number in finding["versions"].items())
    word = "proven" if finding["ok"] else f"WRONG from block {finding['block']}"
    return f"{word}: weights off by {finding['steps']:.2g} steps, logits by {finding['logits']:.2g} std ({versions})"


if __name__ == "__main__":
    main()

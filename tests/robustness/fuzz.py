"""Changes checkpoints, texts and recipes, gives them to lmpress, and looks for anything but an answer or one line of error.

    python tests/robustness/fuzz.py --seconds 3600             every place in turn, again and again with other seeds
    python tests/robustness/fuzz.py --fixed known.json         the fixed cases; `--update` writes what fails into the file
    python tests/robustness/fuzz.py --case packed/config.json/value/7/eval --keep FOLDER

A case is SAMPLE/FILE/CHANGE/SEED/COMMAND. Faults are grouped by what went wrong; each group names its first case.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import Outcome, faults, run_child, settle
from containers import mutators
from known import check
from mutations import order

FIXED = 70  # cases of the short run that are spread over all places
FOUND = Path(__file__).parent / "fuzz_found.txt"  # and those that long runs have found, one for each kind of fault
DENSE, SEALED = ("dense", "sharded"), ("packed", "int8", "spqr", "bitmask", "2-4", "llm-int8", "nf4")
FOREIGN = ("gptq", "awq", "bitsandbytes", "gguf")
COMMANDS = {
    "dense": ("inspect", "eval", "load", "rtn", "plan"),
    "sharded": ("inspect", "load", "rtn"),
    "gguf": ("inspect", "eval", "load", "export", "rtn"),
    "recipe": ("show", "run"),
    "text": ("read", "calibrate"),
}
ATTACKED = (".safetensors", ".gguf", ".json")
ASIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "report.json")  # the same in all samples
PACKED = ("inspect", "eval", "load", "export")


@dataclass(frozen=True)
class Case:
    """A change of one file of a sample, and the command that reads it then."""

    sample: str
    file: str
    change: str
    seed: int
    command: str

    def __str__(self) -> str:
        return "/".join((self.sample, self.file, self.change, str(self.seed), self.command))

    @classmethod
    def parse(cls, text: str) -> "Case":
        """The case of a name."""
        sample, file, change, seed, command = text.split("/")
        return cls(sample, file, change, int(seed), command)


@dataclass(frozen=True)
class Finding:
    """What came of a case: its faults, and whether changed data were accepted with exit code 0."""

    case: Case
    faults: list[str]
    accepted: bool
    outcome: Outcome


def places(samples: Path) -> list[tuple[str, str, str, str]]:
    """Every sample, file, change and command that belong together."""
    found = []
    for sample in (*DENSE, *SEALED, *FOREIGN):
        files = [file.name for file in sorted((samples / sample).iterdir()) if file.suffix in ATTACKED]
        commands = COMMANDS.get(sample, PACKED)
        found += [(sample, file, commands) for file in files if sample in ("dense", "packed") or file not in ASIDE]
    found += [("recipe", name, COMMANDS["recipe"]) for name in ("gptq.yaml", "chain.yaml")]
    found += [("text", name, COMMANDS["text"]) for name in ("text.txt", "text.jsonl", "text.parquet")]
    return [
        (sample, file, change, command)
        for sample, file, commands in found
        for change in mutators(file)
        for command in commands
    ]


def fixed_cases(samples: Path) -> list[Case]:
    """The cases of the short run: some of all places, the same ones until places are added, and what was found before."""
    cases = [Case(sample, file, change, 0, command) for sample, file, change, command in places(samples)]
    found = [Case.parse(line) for line in FOUND.read_text().split()]
    return sorted({*sorted(cases, key=lambda case: order("fixed", case))[:FIXED], *found}, key=str)


def all_cases(samples: Path, only: list[str], start: int, worker: int, workers: int) -> Iterator[Case]:
    """Every place of the samples `only`, or of all, with one seed after the other; those of one worker out of several."""
    chosen = [place for place in places(samples) if place[0] in only or not only]
    seed = start
    while True:
        cases = [Case(sample, file, change, seed, command) for sample, file, change, command in chosen]
        yield from sorted(cases, key=lambda case: order("all", case))[worker::workers]
        seed += 1


def prepare(case: Case, samples: Path, folder: Path) -> tuple[Path, bool]:
    """Lay the changed sample into `folder`; the path that a command is given, and whether the file really differs."""
    source = samples / case.sample if (samples / case.sample).is_dir() else samples
    target = folder / ("model" if source != samples else "given")
    target.mkdir()
    for file in source.iterdir() if source != samples else [samples / case.file]:
        if file.name != case.file:
            os.link(file, target / file.name)
    data = (source / case.file).read_bytes()
    changed = mutators(case.file)[case.change](data, str(case))
    (target / case.file).write_bytes(changed)
    os.link(samples / "text.txt", folder / "text.txt")  # which recipes read
    return (target if source != samples else target / case.file), changed != data


def arguments(case: Case, given: Path, samples: Path, out: Path) -> list[str]:
    """The command line of a case."""
    text, dense = str(samples / "text.txt"), str(samples / "dense")
    rows = ["--rows", "2", "--seq-len", "8"]
    calibration = ["--bits", "4", "--group-size", "8", "--samples", "2", "--seq-len", "8", "-o", str(out)]
    lines = {
        "inspect": ["inspect", str(given)],
        "eval": ["eval", str(given), "--data", text, *rows],
        "rtn": ["quantize", str(given), "--method", "rtn", *calibration],
        "plan": ["quantize", str(given), "--calib", text, "--dry-run", *calibration],
        "export": ["export", str(given), "--format", "fp32", "-o", str(out)],
        "show": ["recipes", "show", str(given)],
        "run": ["run", dense, "--recipe", str(given), "--dry-run", "-o", str(out)],
        "read": ["eval", dense, "--data", str(given), *rows],
        "calibrate": ["quantize", dense, "--calib", str(given), "--quality", "fast", *calibration],
    }
    return lines[case.command]


def perform(case: Case, given: Path, samples: Path, out: Path, debug: bool = False) -> int:
    """What the child does: the command, or the Python function of that name."""
    import lmpress
    from lmpress.cli import app

    if case.command != "load":
        app([*arguments(case, given, samples, out), *(["--debug"] if debug else [])])
        return 0
    try:
        lmpress.load(given)
    except lmpress.CompressError as error:
        if debug:
            raise
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


def warm_up(samples: Path) -> None:
    """Run commands in this process once, so that its children find everything imported."""
    from lmpress.cli import app

    given = {
        "inspect": "packed",
        "eval": "packed",
        "rtn": "dense",
        "plan": "dense",
        "show": "gptq.yaml",
        "export": "packed",
    }
    with tempfile.TemporaryDirectory() as scratch:
        for command, sample in given.items():
            case, out = Case(sample, "", "", 0, command), Path(scratch) / "out"
            app([*arguments(case, samples / sample, samples, out), "-q"], standalone_mode=False)
            shutil.rmtree(out, ignore_errors=True)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page


def attempt(case: Case, samples: Path, folder: Path, debug: bool = False) -> Finding:
    """Run one case in `folder`, which is empty, and judge it."""
    given, changed = prepare(case, samples, folder)
    out = folder / "out"
    outcome = run_child(lambda: perform(case, given, samples, out, debug), folder)
    found = faults(outcome)
    if outcome.code not in (0, 3) and out.exists():
        found.append("a result in spite of the error")
    if (folder / "ran").exists():
        found.append("code was run")
    accepted = changed and outcome.code == 0
    if accepted and case.sample in SEALED and case.command == "inspect" and case.file.endswith(".safetensors"):
        found.append("damage accepted")
    return Finding(case, found, accepted, outcome)


def attempts(cases: Iterator[Case], samples: Path, scratch: Path, seconds: float) -> Iterator[Finding]:
    """Run cases one after the other until the time is over."""
    started = time.monotonic()
    for number, case in enumerate(cases):
        if time.monotonic() - started > seconds:
            return
        folder = scratch / str(number)
        folder.mkdir()
        yield attempt(case, samples, folder)
        shutil.rmtree(folder)


def signature(finding: Finding) -> str:
    """What cases with the same cause have in common: the command, the faults, and the message without its particulars."""
    raised = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", finding.outcome.stderr, re.MULTILINE)[-1:]
    said = finding.outcome.error_lines or raised or finding.outcome.stderr.strip().splitlines()[-1:] or [""]
    words = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|\d[\d,.]*|n{20,}|\([^)]*\)", "_", said[0].removeprefix("error: "))
    return f"{finding.case.command}: {', '.join(finding.faults)}: {words[:120]}"


def traced(case: Case, samples: Path, scratch: Path) -> list[str]:
    """The last lines of our own code in the traceback of a case that is run again with --debug."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        stderr = attempt(case, samples, Path(folder), debug=True).outcome.stderr
    import lmpress

    root = str(Path(lmpress.__file__).parent)
    frames = re.findall(rf'File "{re.escape(root)}/(.*?)", line (\d+), in (\w+)', stderr)
    return [*(f"{file}:{line} {name}" for file, line, name in frames[-2:]), *stderr.strip().splitlines()[-1:]]


def summarize(findings: Iterator[Finding], samples: Path, scratch: Path) -> dict[str, Any]:
    """Count what happened; for each kind of fault how often, the first case, its last words and where they come from."""
    kinds: dict[str, dict[str, Any]] = {}
    accepted: Counter[str] = Counter()
    total, started, slowest = 0, time.monotonic(), 0.0
    for finding in findings:
        total += 1
        slowest = max(slowest, finding.outcome.seconds)
        if finding.accepted:
            accepted[f"{finding.case.sample}/{finding.case.file}/{finding.case.change}"] += 1
        if finding.faults:
            kind = kinds.setdefault(signature(finding), {"count": 0, "case": str(finding.case)})
            kind["count"] += 1
            if kind["count"] == 1:
                print(finding.case, finding.faults, file=sys.stderr, flush=True)
    for kind in kinds.values():
        kind["where"] = traced(Case.parse(kind["case"]), samples, scratch)
    rate = total / max(1e-9, time.monotonic() - started)
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]["count"]))
    return {"cases": total, "per_second": rate, "slowest": slowest, "faults": ordered, "accepted": dict(accepted)}


def check_fixed(file: Path, samples: Path, scratch: Path, update: bool) -> int:
    """Run the fixed cases and hold what fails against the table of known failures."""
    cases = fixed_cases(samples)
    found = {str(each.case): each.faults for each in attempts(iter(cases), samples, scratch, 1e9) if each.faults}
    return check(file, found, len(cases), update)


def show(case: Case, samples: Path, folder: Path) -> int:
    """Run one case, print all about it, and leave its files in `folder`."""
    folder.mkdir(parents=True)
    finding = attempt(case, samples, folder)
    print(finding.outcome.output)
    print(f"exit code {finding.outcome.code}, {finding.outcome.seconds:.1f} s, faults: {finding.faults or 'none'}")
    with contextlib.suppress(KeyError):
        print("compress", *arguments(case, folder / "model", samples, folder / "out"))
    return int(bool(finding.faults))


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--fixed", type=Path, help="table of known failures")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--case")
    parser.add_argument("--keep", type=Path, help="folder for the files of --case")
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--only", default="", help="samples, separated by commas: gguf,recipe,text")
    parser.add_argument("--worker", default="0/1", help="number of this worker and of all: 0/2")
    given = parser.parse_args()
    settle()
    from samples import make_samples

    with tempfile.TemporaryDirectory(prefix="lmpress-fuzz-") as scratch:
        samples = Path(scratch) / "samples"
        with contextlib.redirect_stdout(sys.stderr):
            make_samples(samples)
            warm_up(samples)
        if given.case:
            return show(Case.parse(given.case), samples, given.keep or Path(scratch) / "case")
        if given.fixed:
            return check_fixed(given.fixed, samples, Path(scratch), given.update)
        worker, workers = (int(each) for each in given.worker.split("/"))
        cases = all_cases(samples, given.only.split(",") if given.only else [], given.seed, worker, workers)
        found = summarize(attempts(cases, samples, Path(scratch), given.seconds), samples, Path(scratch))
    print(json.dumps(found, indent=1))
    return int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())

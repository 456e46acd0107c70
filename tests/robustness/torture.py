"""Kills runs and fails their disks at many points, repeats the same command, and compares with a run that was left alone.

    python tests/robustness/torture.py --points 50             points of each kind of end and each command, evenly spread
    python tests/robustness/torture.py --fixed known.json      the fixed points; `--update` writes what fails into the file
    python tests/robustness/torture.py --point gptq/eio/17

A point is COMMAND/END/NUMBER: the number of the operation on the disk at which the end comes (see disk.py), or for the fixed
points a share of all operations, `50%`, or `named`, the first one after the result got its name.
"""

import argparse
import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import Outcome, faults, run_child, settle
from disk import EIO, ENOSPC, FILLS, KILL, Disk, install
from known import check

ENDS = (KILL, EIO, ENOSPC)
OUT = "out"
CALIBRATION = ["--calib", "{text}", "--samples", "4", "--seq-len", "16"]
GROUPS = ["--group-size", "8"]
TAUGHT = ["--drop", "0.5", "--choice", "spread", "--data", "{text}", "--samples", "16", "--seq-len", "16", "--steps", "4",
          "--batch", "4", "--checks", "2"]  # fmt: skip
COMMANDS = {
    "gptq": ["quantize", "{dense}", "--method", "gptq", "--quality", "fast", *GROUPS, *CALIBRATION],
    "best": ["quantize", "{dense}", "--method", "gptq", "--quality", "best", *GROUPS, *CALIBRATION],
    "awq": ["quantize", "{dense}", "--method", "awq", *GROUPS, *CALIBRATION],
    "rtn": ["quantize", "{dense}", "--method", "rtn", *GROUPS],
    "prune": ["prune", "{dense}", "--sparsity", "0.5", *CALIBRATION],
    "distill": ["distill", "{dense}", *TAUGHT],
    "chain": ["run", "{dense}", "--recipe", "{chain}"],
    "export": ["export", "{packed}", "--format", "gptq"],
}
RESUMED = COMMANDS.keys() - {"export"}  # an export begins again
FIXED = {
    "gptq": ("kill/60%", "eio/60%", "enospc/60%", "kill/named"),
    "best": ("kill/60%", "eio/60%"),
    "awq": ("kill/40%", "enospc/60%"),
    "rtn": ("eio/20%", "enospc/0%"),
    "prune": ("kill/60%", "eio/90%"),
    "distill": ("kill/60%", "eio/60%", "enospc/90%", "kill/named"),
    "chain": ("kill/60%", "eio/40%", "kill/named"),
    "export": ("kill/60%", "eio/60%", "enospc/40%"),
}
Contents = dict[str, bytes]


@dataclass(frozen=True)
class Undisturbed:
    """A run that was left alone: its exit code, its operations on the disk, and what it wrote.

    `unequal` are the files in which a second such run differs; they are not compared.
    """

    code: int
    operations: list[tuple[str, str]]
    contents: Contents
    unequal: set[str]


@dataclass(frozen=True)
class Finding:
    """What came of an end: the operation at which it came, the faults, and how many operations the repetition took."""

    point: str
    operation: str
    faults: list[str]
    repeated: int
    said: str


def contents(folder: Path) -> Contents:
    """Every file in a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def words(command: str, samples: Path, root: Path) -> list[str]:
    """The command line, which writes to `root`/out."""
    paths = {"text": samples / "text.txt", "chain": samples / "chain.yaml"} | {
        n: samples / n for n in ("dense", "packed")
    }
    return [*(word.format(**paths) for word in COMMANDS[command]), "-o", str(root / OUT)]


def perform(command: str, samples: Path, disk: Disk, record: Path) -> int:
    """What the child does: the command with its disk replaced; the operations go to the file `record`."""
    from lmpress.cli import app

    real_open = open
    install(disk)
    try:
        app(words(command, samples, disk.root))
    finally:
        with real_open(record, "w") as file:
            json.dump(disk.operations, file)
    return 0


def execute(
    command: str, samples: Path, folder: Path, end: str = KILL, at: int = -1
) -> tuple[Outcome, list[tuple[str, str]]]:
    """Run `command` into `folder`/root in a child whose disk ends at an operation; its outcome and operations."""
    root, record = folder / "root", folder / "operations.json"
    root.mkdir(exist_ok=True)
    shutil.copyfile(samples / "text.txt", folder / "text.txt")  # which the chain reads
    record.unlink(missing_ok=True)
    outcome = run_child(
        lambda: perform(command, samples, Disk(root, end, at), record), folder, cpu_seconds=120, wall_seconds=600
    )
    return outcome, [tuple(each) for each in json.loads(record.read_text())] if record.exists() else []


def undisturbed(command: str, samples: Path, scratch: Path) -> Undisturbed:
    """Run a command twice and compare. Raises `RuntimeError` if it fails when nothing is done to it."""
    results = []
    for number in range(2):
        folder = scratch / f"{command}-{number}"
        folder.mkdir()
        outcome, operations = execute(command, samples, folder)
        if outcome.code not in (0, 3) or faults(outcome):
            raise RuntimeError(f"{command} fails undisturbed: {outcome.output}")
        results.append((outcome.code, operations, contents(folder / "root" / OUT)))
        shutil.rmtree(folder)
    (code, operations, first), (_, _, second) = results
    return Undisturbed(
        code, operations, first, {name for name in first | second if first.get(name) != second.get(name)}
    )


def resolve(number: str, base: Undisturbed) -> int:
    """The operation that a point names: a number, a share, or the first one after the result got its name."""
    count = len(base.operations)
    if number == "named":  # the last rename of a sibling gives it
        renames = [
            i for i, (kind, path) in enumerate(base.operations) if kind == "rename" and not path.endswith(".partial")
        ]
        return min(renames[-1] + 1, count - 1)
    if number.endswith("%"):
        return min(int(number[:-1]) * count // 100, count - 1)
    return int(number)


def attempt(point: str, samples: Path, scratch: Path, base: Undisturbed) -> Finding:
    """End a run at a point, repeat it, and judge both."""
    command, end, number = point.split("/")
    at = resolve(number, base)
    folder = scratch / point.replace("/", "-")
    folder.mkdir()
    out = folder / "root" / OUT
    first, _ = execute(command, samples, folder, end, at)
    found, said = [], first.stderr[-300:]
    if end != KILL:
        found += [f"ended: {fault}" for fault in faults(first)]
    if out.exists() and unlike(base, contents(out)):
        found.append("half a result under its name")
    if first.code != base.code or end == KILL:
        second, operations = execute(command, samples, folder)
        found += judged_repetition(second, base, folder / "root")
        said += second.stderr[-300:]
    else:  # the failure was no reason to stop
        operations = []
        found += leftovers(folder / "root")
    half = len(base.operations) / 2
    if end != KILL and command in RESUMED and at >= half and len(operations) >= len(base.operations):
        found.append("finished work was thrown away")
    shutil.rmtree(folder)
    kind, path = base.operations[at]
    return Finding(point, f"{kind} {path}", found, len(operations), said)


def judged_repetition(outcome: Outcome, base: Undisturbed, root: Path) -> list[str]:
    """What is wrong after the same command was given again."""
    found = [f"repeated: {fault}" for fault in faults(outcome)]
    if outcome.code != base.code:
        message = outcome.error_lines[-1] if outcome.error_lines else "no message"
        found.append(f"repeated: exit code {outcome.code}: {re.sub(r'/[^ ;:]+/', '', message)}")
    elif different := unlike(base, contents(root / OUT)):
        found.append(f"repeated: other bytes in {', '.join(different)}")
    return [*found, *leftovers(root)]


def unlike(base: Undisturbed, found: Contents) -> list[str]:
    """The files that are not what an undisturbed run writes."""
    names = sorted((base.contents.keys() | found.keys()) - base.unequal)
    return [name for name in names if base.contents.get(name) != found.get(name)]


def leftovers(root: Path) -> list[str]:
    """Whatever lies beside the result but its log."""
    names = sorted(path.name for path in root.iterdir() if path.name not in (OUT, f"{OUT}.log"))
    return [f"left behind: {name}" for name in names]


def spread(command: str, base: Undisturbed, points: int) -> Iterator[str]:
    """Points evenly over the operations of a command, for each kind of end."""
    for end in ENDS:
        able = [number for number, (kind, _) in enumerate(base.operations) if end != ENOSPC or kind in FILLS]
        count = min(points, len(able))
        yield from (f"{command}/{end}/{able[index * len(able) // count]}" for index in range(count))


def check_fixed(file: Path, samples: Path, scratch: Path, update: bool) -> int:
    """Try the fixed points, and hold what fails against the table of known failures."""
    found = {}
    for command, ends in FIXED.items():
        base = undisturbed(command, samples, scratch)
        if base.unequal:
            found[command] = [f"equal runs write other bytes in {', '.join(sorted(base.unequal))}"]
        findings = (attempt(f"{command}/{end}", samples, scratch, base) for end in ends)
        found |= {finding.point: finding.faults for finding in findings if finding.faults}
    return check(file, found, sum(map(len, FIXED.values())), update)


def torture(commands: list[str], points: int, samples: Path, scratch: Path) -> dict[str, Any]:
    """Try many points of each command; how many went well, and for each kind of fault its points."""
    kinds: dict[str, list[str]] = {}
    results: dict[str, Any] = {}
    for command in commands:
        base = undisturbed(command, samples, scratch)
        results[command] = {"operations": len(base.operations), "unequal": sorted(base.unequal)}
        for end in ENDS:
            tried = [point for point in spread(command, base, points) if point.split("/")[1] == end]
            findings = [attempt(point, samples, scratch, base) for point in tried]
            failed = [finding for finding in findings if finding.faults]
            results[command][end] = f"{len(tried) - len(failed)} of {len(tried)}"
            for finding in failed:
                kind = f"{re.sub('[0-9]+', '#', finding.operation)}: {'; '.join(finding.faults)}"
                kinds.setdefault(kind, []).append(finding.point)
            print(command, end, results[command][end], file=sys.stderr, flush=True)
    return {"held": results, "faults": kinds}


def show(point: str, samples: Path, scratch: Path) -> int:
    """Try one point, and print all about it."""
    command = point.partition("/")[0]
    finding = attempt(point, samples, scratch, undisturbed(command, samples, scratch))
    print(f"{finding.said}\n{finding.point} at {finding.operation}: {finding.faults or 'no faults'}")
    print("compress", *words(command, samples, scratch))
    return int(bool(finding.faults))


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--only", default=",".join(COMMANDS), help="commands, separated by commas")
    parser.add_argument("--fixed", type=Path, help="table of known failures")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--point")
    given = parser.parse_args()
    settle()
    from samples import make_samples

    with tempfile.TemporaryDirectory(prefix="lmpress-torture-") as folder:
        samples, scratch = Path(folder) / "samples", Path(folder)
        with contextlib.redirect_stdout(sys.stderr):
            make_samples(samples)
        if given.point:
            return show(given.point, samples, scratch)
        if given.fixed:
            return check_fixed(given.fixed, samples, scratch, given.update)
        found = torture(given.only.split(","), given.points, samples, scratch)
    print(json.dumps(found, indent=1))
    return int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())

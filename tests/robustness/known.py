"""The tables of what is known to fail: a case and its faults.

A test compares them with what fails, so that a fix must take its cases out.
"""

import json
from pathlib import Path

Failures = dict[str, list[str]]


def check(file: Path, found: Failures, count: int, update: bool) -> int:
    """Compare the failures of `count` cases with the table in `file`, or write them there; prints every difference as JSON."""
    if update:
        file.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    known: Failures = json.loads(file.read_text())
    print(json.dumps({"cases": count, "known": len(known), "differences": differences(known, found)}, indent=1))
    return int(known != found)


def differences(known: Failures, found: Failures) -> dict[str, str]:
    """For every case that differs from the table: its known faults and those that were found."""
    cases = sorted(known.keys() | found.keys())
    return {
        case: f"known {known.get(case, [])}, found {found.get(case, [])}"
        for case in cases
        if known.get(case) != found.get(case)
    }

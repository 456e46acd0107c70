"""The direction of imports: every arrow runs down, function-level and TYPE_CHECKING imports included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    "errors",
    "recipes",
    "kernels",
    "calibrate",
    "compress",
    "eval",
    "cli",
)  # a floor imports from those before it
# The rooms of a floor, lowest first: a room imports from those before it, not from those that share its line.
ROOMS = {
    "recipes": ("fields parsing scheme", "keywords methods training", "schema", "naming options", "chain"),
    "kernels": (
        "packing",
        "tensor",
        "activations weight",
        "cache kernel",
        "outliers packed_layout reference",
        "torch_int4 cpu selftest",
        "ops triton",
        "dispatch",
        "modules",
    ),
    "calibrate": (
        "data model",
        "activation_store statistics",
        "observers runner",
        "channel_graph fidelity recording",
        "kv_cache",
    ),
    "compress": (
        "solver",
        "block",
        "formats input_grids",
        "plan",
        "output report runtime_support",
        "distill methods workspace",
        "export pipeline",
        "load",
        "allocation structured",
        "run",
        "chain",
        "api command",
    ),
    "eval": (
        "engines processes",
        "protocol",
        "inspect",
        "dispatch_report",
        "perplexity runtimes timing",
        "verify",
        "tables",
        "commands",
    ),
}
# Files whose functions may import our own code: for start-up time, and because Triton is loaded only if it can run.
LATE = ("cli.py", "*/commands.py", "compress/command/*.py", "kernels/triton/*.py", "kernels/triton/*/*.py")


def files_of(floor: str) -> list[Path]:
    single = ROOT / f"{floor}.py"
    files = [single] if single.exists() else sorted((ROOT / floor).rglob("*.py"))
    assert files, f"{floor} has no files"
    return files


def own_imports(path: Path, tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """The modules of ours that are imported anywhere below `tree`, a node of the module at `path`, from the root on."""
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            yield from (
                [(*base, *node.module.split("."))] if node.module else [(*base, alias.name) for alias in node.names]
            )


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_run_downwards(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    reached = {file: {name[0] for name in own_imports(file, parsed(file))} & above for file in files_of(floor)}
    assert {str(file.relative_to(ROOT)): up for file, up in reached.items() if up} == {}


@pytest.mark.parametrize("floor", ROOMS)
def test_rooms_import_from_lower_rooms(floor: str) -> None:
    order = {room: level for level, rooms in enumerate(ROOMS[floor]) for room in rooms.split()}
    wrong: dict[str, set[str]] = {}
    found: set[str] = set()
    for file in files_of(floor):
        inside = file.relative_to(ROOT / floor).with_suffix("").parts
        if inside == ("__init__",):
            continue
        found.add(inside[0])
        for name in own_imports(file, parsed(file)):
            if name[0] == floor and len(name) > 1 and name[1] != inside[0] and order[name[1]] >= order[inside[0]]:
                wrong.setdefault(str(file.relative_to(ROOT)), set()).add(name[1])
    assert wrong == {}
    assert found == set(order)


def late_imports(path: Path) -> int:
    functions = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sum(1 for function in functions for node in function.body for _ in own_imports(path, node))


def test_functions_import_our_own_code_only_if_start_up_needs_it() -> None:
    files = [file.relative_to(ROOT) for floor in FLOORS for file in files_of(floor)]
    late = {path.as_posix(): late_imports(ROOT / path) for path in files if not any(path.match(p) for p in LATE)}
    assert {path: count for path, count in late.items() if count} == {}

"""The documentation agrees with the code: options, defaults, command lines, formats and links are compared."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from lmpress import cli
from lmpress.compress import export
from lmpress.compress.command import flags
from lmpress.compress.runtime_support import ROW, TARGETS, RuntimeFormat
from lmpress.recipes.methods import METHODS, QUALITIES, Method, method

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
OPTIONS = "## Options"
DESCRIBED_IN_WORDS = {"scheme"}  # a default that is a value of many parts
BUILD_RECIPES = ("quantize", "prune", "run")


@pytest.mark.parametrize("name", METHODS)
def test_the_option_table_of_a_method_is_its_config(name: str) -> None:
    page = DOCS / "methods" / f"{name}.md"
    assert page.is_file(), f"write docs/methods/{name}.md"
    known, described = method(name), option_table(page.read_text(encoding="utf-8"))
    assert list(described) == known.options()
    for field in fields(known.config):
        for column, cell in described[field.name].items():
            if column in ("default", *QUALITIES) and field.name not in DESCRIBED_IN_WORDS:
                assert yaml.safe_load(cell) == value_in(known, field, column, described), (field.name, column)


def test_the_generated_pages_are_up_to_date(generator: ModuleType) -> None:
    pages = generator.pages()
    assert {page.relative_to(ROOT).as_posix() for page in pages} == {"docs/taxonomy.md", "docs/index.md", "README.md"}
    stale = [page.name for page, text in pages.items() if page.read_text(encoding="utf-8") != text]
    assert stale == [], "run: python docs/generate.py"


def test_a_page_without_its_markers_is_refused(generator: ModuleType) -> None:
    with pytest.raises(ValueError, match="the page lacks"):
        generator.with_section("no markers", "text")
    page = f"before {generator.BEGIN} old {generator.END} after"
    assert generator.with_section(page, "new ") == f"before {generator.BEGIN}\nnew {generator.END} after"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_line_parses(page: Path, parsed_only: None) -> None:
    for line in command_lines(page.read_text(encoding="utf-8")):
        done = invoke(line)
        assert done.exit_code == 0, f"{line}: {done.output}"


@pytest.mark.parametrize("line", ["quantize --bitz 4 MODEL", "quantize MODEL --bits four", "prune", "shrink MODEL"])
def test_a_wrong_command_line_is_refused(line: str, parsed_only: None) -> None:
    assert invoke(f"compress {line}").exit_code == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_that_is_mentioned_exists(page: Path) -> None:
    for span in mentions(page.read_text(encoding="utf-8")):
        command, rest = named(re.sub(r"[\[\]]", " ", span).split()[1:])
        known = {flag for parameter in command.params for flag in parameter.opts}
        assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= known, span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_recipe_that_a_command_line_asks_for_can_be_built(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(cli, "run_recipe", lambda model, *_: built.append(model))
    lines = [line for line in command_lines(page.read_text(encoding="utf-8")) if line.split()[1] in BUILD_RECIPES]
    for line in lines:
        done = invoke(line)
        assert done.exit_code == 0, f"{line}: {done.output}"
    assert len(built) == len(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_relative_link_has_a_target(page: Path) -> None:
    for target in links(page):
        assert target.exists(), target


def test_the_index_links_to_every_page() -> None:
    listed = {target.resolve() for target in links(DOCS / "index.md")}
    assert {page for page in PAGES if page.is_relative_to(DOCS)} - listed == {DOCS / "index.md"}


def test_the_page_of_formats_lists_what_runtimes_accept() -> None:
    page = (DOCS / "formats.md").read_text(encoding="utf-8").splitlines()
    for runtime, containers in TARGETS.items():
        for container in containers:
            assert row_of(runtime, container) in page
    assert sum(line.startswith("| `") and line.count("|") == 10 for line in page) == sum(map(len, TARGETS.values()))
    assert all(any(f"| `{name}` |" in line for line in page) for name in export.formats())


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module docs/generate.py."""
    monkeypatch.syspath_prepend(DOCS)
    return import_module("generate")


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end before their work begins."""

    def end(*_: object) -> NoReturn:
        raise typer.Exit

    monkeypatch.setattr(flags, "session", end)


def option_table(page: str) -> dict[str, dict[str, str]]:
    """The table below the heading `OPTIONS`: option -> column -> cell, backquotes taken off; empty without options."""
    assert f"\n{OPTIONS}\n" in page, f"the page has no heading {OPTIONS!r}"
    section = re.split(r"\n## ", page.partition(f"\n{OPTIONS}\n")[2])[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table_lines(section)]
    if not rows:
        return {}
    header, _, *body = rows
    assert header[:2] == ["option", "default"]
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def table_lines(section: str) -> list[str]:
    """The lines of the first table."""
    found = re.search(r"(?:^\|.*\n?)+", section, re.MULTILINE)
    return found[0].splitlines() if found else []


def value_in(known: Method, field: Field[Any], column: str, described: Mapping[str, Mapping[str, str]]) -> Any:
    """The text that a cell must have: the default, or the value of a quality; None (an empty cell) if that changes nothing."""
    default = None if field.default is MISSING else field.default
    return default if column == "default" else known.preset(column).get(field.name)


def command_lines(page: str) -> Iterator[str]:
    """The lines of code blocks that begin with `compress`, wherever it is installed."""
    for line in code_lines(page):
        if re.match(r"(\.venv/bin/)?compress ", line):
            yield line


def code_lines(page: str) -> Iterator[str]:
    fenced = False
    for line in page.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def mentions(page: str) -> list[str]:
    """Code spans in running text that begin with `compress`; they need not be whole."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`(compress [^`]+)`", text)


def invoke(line: str) -> Result:
    return CliRunner().invoke(cli.app, shlex.split(line, comments=True)[1:])


def named(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and the words after it."""
    command: Any = typer.main.get_command(cli.app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def links(page: Path) -> Iterator[Path]:
    """The targets of the page's relative links."""
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            yield page.parent / target


def row_of(runtime: str, container: RuntimeFormat) -> str:
    """The line of the page that lists what `runtime` reads of one format."""
    groups = "any" if container.groups is None else ", ".join("row" if g == ROW else str(g) for g in container.groups)
    if container.block > 1:
        groups = f"multiples of {container.block}"
    grids = " and ".join("symmetric" if symmetric else "asymmetric" for symmetric in container.symmetric)
    alike = {(True, True): "all layers", (True, False): "all layers", (False, True): "joined projections"}
    cells = [
        f"`{runtime}`",
        f"`{container.format}`",
        ", ".join(map(str, container.bits)),
        grids,
        groups,
        f"multiples of {container.multiple}" if container.multiple > 1 else "any",
        alike.get((container.uniform, container.fused), "none"),
        ("any" if container.kinds is None else ", ".join(container.kinds)) + (", Conv1D" if container.conv1d else ""),
        " or ".join(container.inputs) or "as they are",
    ]
    return f"| {' | '.join(cells)} |"


MARKDOWN = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "examples" / "sample_model" / "README.md"]
INVENTED = ("nearest_even", "nearest-even", "stochastic")  # the method that CONTRIBUTING adds as an example
FOLDERS = "calibrate|compress|kernels|eval|recipes|tests|docs|benchmarks|examples"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.stem)
def test_every_path_in_backticks_is_in_the_repository(page: Path) -> None:
    missing = [path for path in named_paths(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()]
    assert not missing


def test_paths_in_backticks_are_found() -> None:
    page = "`compress/plan.py`, `kernels/cache/`; see `python benchmarks/quality.py MODEL` and `compress eval --speed`."
    assert named_paths(page) == ["compress/plan.py", "kernels/cache/", "benchmarks/quality.py"]


def named_paths(page: str) -> list[str]:
    """Files and folders of the repository that code spans name, whole or as words of a command line."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL))
    words = [word.rstrip(",;") for span in spans for word in span.split()]
    paths = [word for word in words if re.fullmatch(rf"(?:{FOLDERS})/[\w./-]*", word)]
    return [path for path in paths if not any(name in path for name in INVENTED)]

"""One field, one flag, one keyword: the command line and the Python API are made from the option models; no flag is ignored."""

import ast
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
from typer.testing import CliRunner, Result

import lmpress
from lmpress import cli
from lmpress.compress.command.flags import ResultFlags, RunFlags, check_outputs
from lmpress.errors import UsageError
from lmpress.recipes.fields import Options, flag_name, flag_of, option_fields
from lmpress.recipes.methods import METHODS
from lmpress.recipes.options.distill import DistillOptions
from lmpress.recipes.options.evaluate import BenchOptions, EvaluateOptions
from lmpress.recipes.options.prune import PruneOptions
from lmpress.recipes.options.quantize import QuantizeOptions

ROOT = Path(__file__).parents[1]
NOT_THE_PACKAGE = {"tests", "benchmarks", "examples", "docs", "build", "dist"}
OF_OTHER_PROGRAMS = {"--merge"}  # of llama-gguf-split
COMMANDS = [
    ("quantize", QuantizeOptions, lmpress.quantize),
    ("prune", PruneOptions, lmpress.prune),
    ("distill", DistillOptions, lmpress.distill),
    ("eval", EvaluateOptions, lmpress.evaluate),
]


def compress(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def commands_of(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, those of groups too."""
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
    for word, each in (below or {}).items():
        yield from commands_of(each, f"{name} {word}".strip())


EVERY = dict(commands_of(typer.main.get_command(cli.app)))


def flags_of(name: str) -> dict[str, Any]:
    """The parameters of a command by every spelling of their flags."""
    parameters = EVERY[name].params
    return {flag: each for each in parameters for flag in (*each.opts, *each.secondary_opts) if flag.startswith("-")}


def texts(file: Path) -> Iterator[str]:
    """The string literals of a Python file, f-strings in one piece."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def mentioned(file: Path) -> set[str]:
    """The flags that a text of several words in the file mentions."""
    found = re.compile(r"(?:^|[ (`'])(--[a-z][a-z-]*)")
    return {flag for text in texts(file) if " " in text.strip() for flag in found.findall(text)}


def test_every_flag_that_a_text_mentions_exists() -> None:
    known = {flag for name in EVERY for flag in flags_of(name)} | OF_OTHER_PROGRAMS
    files = [file for file in ROOT.rglob("*.py") if file.relative_to(ROOT).parts[0] not in NOT_THE_PACKAGE]
    found = {str(file.relative_to(ROOT)): mentioned(file) for file in files if ".venv" not in file.parts}
    assert {file: flags - known for file, flags in found.items() if flags - known} == {}
    assert {"--bits", "--steps", "--overwrite"} <= set().union(*found.values()), "texts are found at all"


@pytest.mark.parametrize(("name", "model", "function"), COMMANDS, ids=[name for name, *_ in COMMANDS])
def test_a_field_is_a_flag_and_a_keyword(name: str, model: type[Options], function: Callable[..., Any]) -> None:
    keywords = inspect.signature(function).parameters
    for field, entry in option_fields(model).items():
        assert field in keywords and f"{field}: " in (function.__doc__ or "")
        if field != "options":
            assert keywords[field].default == entry.get_default(call_default_factory=True)
        if flag_of(entry).by_set:
            assert flag_name(model, field) == f"--set {field}" and f"--{field}" not in flags_of(name)
        else:
            assert flags_of(name)[flag_name(model, field)].help == entry.description
    extra = {"model", "out", "data", "against", "target", "overwrite", "device", "observer", "progress"}
    assert keywords.keys() - option_fields(model).keys() - {"options"} <= extra


@pytest.mark.parametrize("model", [QuantizeOptions, PruneOptions, DistillOptions, EvaluateOptions, BenchOptions,
                                   ResultFlags, RunFlags])  # fmt: skip
def test_every_field_is_described(model: type[Options]) -> None:
    assert [name for name, field in option_fields(model).items() if not field.description] == []


def test_the_help_lists_the_methods_of_the_registry() -> None:
    listed = {
        name: re.findall(r"[\w-]+", flags_of(name)["--method"].help.replace(".", "")) for name in ("quantize", "prune")
    }
    assert {"gptq", "awq", "spqr"} <= set(listed["quantize"]) and {"exactobs", "wanda"} <= set(listed["prune"])
    assert set(listed["quantize"]) | set(listed["prune"]) <= set(METHODS)
    assert not set(listed["quantize"]) & set(listed["prune"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--bits", "4"),
        ("--method", "gptq"),
        ("--asymmetric",),
        ("--symmetric",),
        ("--quality", "balanced"),
        ("--seed", "0"),
        ("--set", "damping=1"),
        ("--keep", "*"),
    ],
    ids=" ".join,
)
def test_a_flag_that_the_recipe_would_override_is_refused(tiny: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    done = compress("quantize", tiny, "--recipe", "gptq-w4", "-o", tmp_path / "out", *flags)
    assert done.exit_code == 2 and f"error: {flags[0]} cannot be combined with --recipe\n" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_recipe_alone_is_run(tiny: Path, tmp_path: Path) -> None:
    done = compress("quantize", tiny, "--recipe", "rtn-w4", "-o", tmp_path / "out", "--quiet")
    assert done.exit_code == 0 and (tmp_path / "out/config.json").exists()
    missing = compress("quantize", tiny, "--recipe", "gptq-w5", "-o", tmp_path / "out")
    assert missing.exit_code == 2 and "gptq-w5: no such recipe" in missing.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "--quality", "finest"], "--quality must be 'fast', 'balanced' or 'best', got 'finest'"),
        (["quantize", "--average-bits", "0"], "--average-bits must be greater than 0, got 0.0"),
        (["quantize", "--bits", "4", "--average-bits", "4"], "--bits and --average-bits are mutually exclusive"),
        (["prune", "--method", "gptq"], "gptq is not a method of compress prune"),
        (["prune", "--format", "zip"], "--format must be 'dense', 'bitmask' or '2:4', got 'zip'"),
        (["distill", "--layers", "1,two"], "--layers expects whole numbers separated by commas, got '1,two'"),
        (["distill", "--drop", "1", "--layers", "0"], "--layers, --keep-layers and --drop are mutually exclusive"),
        (["distill", "--steps", "2", "--set", "steps=3"], "steps is set to 2 and to 3"),
        (["distill", "--set", "hide=1"], "the training has no option 'hide'"),
        (["distill", "--set", "precision=int8"], "--set precision must be 'no', 'bf16' or 'fp16', got 'int8'"),
        (["run", "--recipe", "smaller-w4", "--target", "vllm"], "--target cannot be combined with a chain"),
        (["eval", "--dtype", "int8"], "--dtype must be 'float32'"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_wrong_values_name_the_flag(tiny: Path, arguments: list[str], message: str) -> None:
    done = compress(arguments[0], tiny, *arguments[1:])
    assert done.exit_code == 2 and f"error: {message}" in done.stderr, done.output


def test_python_takes_keywords_or_an_object(tiny: Path, tmp_path: Path) -> None:
    asked = lmpress.QuantizeOptions(method="rtn", group_size=8)
    lmpress.quantize(tiny, tmp_path / "object", options=asked)
    lmpress.quantize(tiny, tmp_path / "keywords", method="rtn", group_size=8)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("object", "keywords"))
    assert first == second
    with pytest.raises(UsageError, match="bits cannot be combined with an object of options"):
        lmpress.quantize(tiny, tmp_path / "out", options=asked, bits=3)
    with pytest.raises(UsageError, match="quality must be 'fast', 'balanced' or 'best', got 'finest'"):
        lmpress.quantize(tiny, tmp_path / "out", quality="finest")
    with pytest.raises(TypeError, match="bitz"):
        lmpress.quantize(tiny, tmp_path / "out", bitz=3)


@pytest.mark.parametrize(("arguments", "resumes"), [(["quantize"], True), (["run", "--recipe", "rtn-w4"], True),
                                                    (["eval"], False), (["inspect"], False)])  # fmt: skip
def test_only_commands_that_resume_offer_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], resumes: bool
) -> None:
    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_recipe", interrupt)
    monkeypatch.setattr("lmpress.eval.perplexity.evaluate", interrupt)
    monkeypatch.setattr("lmpress.eval.inspect.inspect", interrupt)
    done = compress(arguments[0], tiny, *arguments[1:])
    assert done.exit_code == 130 and "error: interrupted" in done.stderr
    assert ("the same command continues" in done.stderr) == resumes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--json", "absent/x.json"), "--json absent/x.json: there is no folder absent"),
        (("--json", "folder"), "--json folder is a directory"),
        (("--json", "file/x.json"), "--json file/x.json: .*file is not a folder"),
        (("--json", "n" * 250), "--json has a name of 250 bytes; 240 are supported"),
        (("-o", "file/a/out"), "-o file/a/out: .*file is not a folder"),
        (("-o", "a/" + "n" * 250), "-o has a name of 250 bytes; 240 are supported"),
    ],
    ids=str,
)
def test_outputs_are_checked_before_any_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str], message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    result = compress("quantize", tiny, "--method", "rtn", "--group-size", "8", *flags)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_bench_and_eval_check_their_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = compress("bench", flag, "absent/x.svg")
    assert result.exit_code == 2 and f"{flag} absent/x.svg: there is no folder absent" in result.stderr


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # root may write everywhere
    for json_file, paths in (
        (str(tmp_path / "x"), {}),
        (None, {"out": tmp_path / "a/b"}),
        (None, {"plot": tmp_path / "x"}),
    ):
        with pytest.raises(UsageError, match="permission denied"):
            check_outputs(json_file, paths)


def test_names_that_are_too_long_are_usage_errors() -> None:
    result = compress("inspect", "n" * 300)
    assert result.exit_code == 2 and "cannot be read (File name too long)" in result.stderr

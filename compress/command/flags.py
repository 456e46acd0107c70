"""From option models to a command's flags, and the flags that several commands share."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import Field
from pydantic.fields import FieldInfo

from ...errors import UsageError
from ...recipes.fields import FLAGS, Flag, Options, flag_name, flag_of, option_fields
from ...recipes.parsing import parse_yaml
from .session import Output, session

Model = Annotated[
    str, typer.Argument(help="Model directory (config.json and safetensors), or org/name of a Hugging Face Hub model.")
]
LONGEST_NAME = 240  # bytes: file systems allow 255, and unfinished results have a longer name
KEYWORD = inspect.Parameter.KEYWORD_ONLY


class SessionFlags(Options):
    """Where results and errors go."""

    json_file: Annotated[str | None, Flag(names=("--json",))] = Field(
        default=None, description="Write the result as JSON to a file, or - for stdout."
    )
    quiet: Annotated[bool, Flag(names=("--quiet", "-q"))] = Field(
        default=False, description="Print nothing but errors."
    )
    debug: bool = Field(default=False, description="Show the traceback of an error.")


class ThreadedFlags(SessionFlags):
    """The same, and how many threads compute."""

    threads: int | None = Field(default=None, ge=1, description="CPU threads.")


class OneThreadFlags(ThreadedFlags):
    """The same, for measurements that compare single threads."""

    threads: int | None = Field(default=1, ge=1, description="CPU threads.")


Session = Annotated[Output, SessionFlags]
ThreadedSession = Annotated[Output, ThreadedFlags]
OneThreadSession = Annotated[Output, OneThreadFlags]


class ResultFlags(Options):
    """Where the result goes, what becomes of it, and on which device it is made."""

    out: Annotated[Path | None, Flag(names=("--out", "-o"))] = Field(
        default=None, description="Directory to write. Default: next to the model."
    )
    evaluate_on: Annotated[str | None, Flag(names=("--eval",))] = Field(
        default=None, description="Evaluate the result against the original on this data."
    )
    overwrite: bool = Field(default=False, description="Replace the output, and discard an unfinished run of it.")
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1, ...")


class RunFlags(ResultFlags):
    """The same for what is planned before it runs."""

    target: Annotated[tuple[str, ...], Flag(separated=True)] = Field(
        default=(), description="Runtimes that must be able to serve the result: vllm,llamacpp."
    )
    dry_run: bool = Field(default=False, description="Print the plan with its exact sizes, and stop.")


def command(app: typer.Typer, name: str | None = None, resumes: bool = False) -> Callable[[Callable[..., None]], Any]:
    """Make a function a command of `app`.

    A parameter whose type is an option model becomes one flag per field, and the function gets the model with the values that
    were given. The parameter of type `Session` (or `ThreadedSession`) becomes the flags of the session that the function runs
    in. `resumes`: the same command continues an interrupted run.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        models = {name: model for name, hint in hints.items() if (model := _model_of(hint)) is not None}
        output_name = next(name for name, model in models.items() if issubclass(model, SessionFlags))

        def call(context: typer.Context, **values: Any) -> None:
            given = {name for name in values if _is_given(context, name)}
            settings = _build(models[output_name], values, given)
            threads = settings.threads if isinstance(settings, ThreadedFlags) else None
            with session(settings.json_file, settings.quiet, settings.debug, threads, resumes) as output:
                arguments: dict[str, Any] = {name: values[name] for name in hints if name in values}
                for parameter, model in models.items():
                    arguments[parameter] = output if parameter == output_name else _build(model, values, given)
                check_outputs(settings.json_file, {name: values.get(name) for name in ("plot", "out")})
                function(**arguments)

        parameters = [inspect.Parameter("context", KEYWORD, annotation=typer.Context)]
        for parameter in inspect.signature(function).parameters.values():
            model = models.get(parameter.name)
            shown = [parameter.replace(kind=KEYWORD, annotation=hints[parameter.name])]
            parameters += shown if model is None else _parameters(model)
        call.__dict__["__signature__"] = inspect.Signature(parameters)
        call.__annotations__ = {each.name: each.annotation for each in parameters}
        call.__doc__ = function.__doc__
        app.command(name or function.__name__)(call)
        return function

    return register


def check_outputs(json_file: str | None, paths: Mapping[str, Path | None]) -> None:
    """Raise `UsageError` if what was given for `--json`, `--plot` or `--out` cannot be written, before any work is done.

    Files need a folder that exists; the folders above a result are created.
    """
    if json_file not in (None, "-"):
        _check_file("--json", Path(str(json_file)))
    plot, out = paths.get("plot"), paths.get("out")
    if plot is not None:
        _check_file("--plot", plot)
    if out is not None:
        _check_name("-o", out)
        _check_folder("-o", out, next((each for each in out.absolute().parents if each.exists()), Path("/")))


def _check_file(flag: str, file: Path) -> None:
    _check_name(flag, file)
    if file.is_dir():
        raise UsageError(f"{flag} {file} is a directory", "give the name of a file")
    if not file.absolute().parent.exists():
        raise UsageError(f"{flag} {file}: there is no folder {file.parent}", "create it, or choose another file")
    _check_folder(flag, file, file.absolute().parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise UsageError(f"{flag} {file} cannot be written (permission denied)", "choose another file")


def _check_folder(flag: str, path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{flag} {path}: {folder} is not a folder", "choose another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {path}: {folder} cannot be written (permission denied)", "choose another path")


def _check_name(flag: str, path: Path) -> None:
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > LONGEST_NAME:
        raise UsageError(f"{flag} has a name of {longest} bytes; {LONGEST_NAME} are supported", "choose a shorter one")


def refuse_with_recipe(options: Options) -> None:
    """Raise `UsageError` if an option was given: with `--recipe` it would have no effect."""
    if options.model_fields_set:
        name = min(options.model_fields_set)
        flag = flag_name(type(options), name, getattr(options, name))
        raise UsageError(f"{flag} cannot be combined with --recipe", f"edit the recipe, or leave out {flag}")


def _model_of(hint: Any) -> type[Options] | None:
    """The option model that a parameter stands for: its type, or what a session is annotated with."""
    candidates = [hint, *getattr(hint, "__metadata__", ())]
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Options)), None)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _build(model: type[Options], values: Mapping[str, Any], given: set[str]) -> Any:
    """The model with the values that were given; the others keep their defaults."""
    fields = {name: field for name, field in option_fields(model).items() if name in given}
    parsed = {name: _parse(model, name, field, values[name]) for name, field in fields.items()}
    return model.model_validate(parsed, context=FLAGS)


def _parse(model: type[Options], name: str, field: FieldInfo, value: Any) -> Any:
    kind, flag = _kind(field), flag_of(field)
    if get_origin(kind) is dict:
        return parse_options(value)
    if not flag.separated:
        return value
    words = [word.strip() for word in value.split(",")]
    if _is_number(kind) and not all(word.isdecimal() for word in words):
        example = flag.metavar or "1,8,64"
        raise UsageError(
            f"{flag_name(model, name)} expects whole numbers separated by commas, got {value!r}",
            f"write for example {example}",
        )
    return [int(word) for word in words] if _is_number(kind) else words


def parse_options(given: list[str]) -> dict[str, Any]:
    """Turn NAME=VALUE pairs into values by YAML's rules. Raises `UsageError`."""
    options = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set expects NAME=VALUE, got {pair!r}", "write for example --set observer=mse")
        try:
            options[name] = parse_yaml(value)
        except ValueError:
            raise UsageError(
                f"--set {pair!r}: the value is not valid YAML", "write a number, a word, true or false"
            ) from None
    return options


def _parameters(model: type[Options]) -> Iterator[inspect.Parameter]:
    """A keyword for typer per field that has a flag."""
    for name, field in option_fields(model).items():
        flag = flag_of(field)
        if flag.by_set:
            continue
        kind, default = _kind(field), field.get_default(call_default_factory=True)
        names = flag.names or (flag_name(model, name),)
        option = typer.Option(
            *names,
            help=field.description,
            metavar=flag.metavar or _metavar(kind),
            show_default=default not in (None, (), {}),
            min=next((each.ge for each in field.metadata if hasattr(each, "ge")), None),
        )
        parameter, default = _shown(kind, default, flag)
        optional = parameter | None if default is None else parameter
        missing = inspect.Parameter.empty if field.is_required() else default
        annotation = Annotated[parameter if field.is_required() else optional, option]
        yield inspect.Parameter(name, KEYWORD, default=missing, annotation=annotation)


def _kind(field: FieldInfo) -> Any:
    """The field's type, without None and without annotations."""
    kind = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not NoneType)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _shown(kind: Any, default: Any, flag: Flag) -> tuple[Any, Any]:
    """The type and the default that typer parses the flag with: texts for what is parsed here."""
    if flag.separated:
        return str, ",".join(map(str, default)) if default else None
    if get_origin(kind) in (tuple, dict):
        return list[str], list(default)
    return (str if get_origin(kind) is Literal else kind), default


def _metavar(kind: Any) -> str | None:
    return "|".join(get_args(kind)) if get_origin(kind) is Literal else None


def _is_number(kind: Any) -> bool:
    first = get_args(kind)[0]
    return (get_args(first)[0] if get_origin(first) is Annotated else first) is int

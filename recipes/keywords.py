"""Python functions whose keywords are the fields of an option model."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from ..errors import UsageError
from .fields import Options, option_fields

Result = TypeVar("Result")
OPTIONS = "options"


def takes(model: type[Options]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function with a keyword `options`, an object of the `model`, take the model's fields as keywords too.

    Its signature and docstring then show them. Callers give either the fields or an object; a mapping as `options` is the
    model's own field of that name, if it has one. Calls raise `UsageError` for values that are not possible.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Result:
            words = {name: value for name, value in keywords.items() if name in model.model_fields or name == OPTIONS}
            others = {name: value for name, value in keywords.items() if name not in words}
            return function(*arguments, options=_options(model, words), **others)

        signature = inspect.signature(function)
        parameters = [each for each in signature.parameters.values() if each.name != OPTIONS]
        first = next(i for i, each in enumerate(parameters) if each.kind is inspect.Parameter.KEYWORD_ONLY)
        shown = [*parameters[:first], *_parameters(model), *parameters[first:]]
        call.__dict__["__signature__"] = signature.replace(parameters=shown)
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_documentation(model)}"
        return call

    return decorate


def _options(model: type[Options], words: dict[str, Any]) -> Options:
    given = words.get(OPTIONS)
    if isinstance(given, model):
        if len(words) > 1:
            other = next(name for name in words if name != OPTIONS)
            raise UsageError(f"{other} cannot be combined with an object of options", f"set it in the {model.__name__}")
        return given
    if given is None:
        words = {name: value for name, value in words.items() if name != OPTIONS}
    return model.model_validate(words)


def _parameters(model: type[Options]) -> list[inspect.Parameter]:
    """The fields as keywords, and `options`."""
    kind = inspect.Parameter.KEYWORD_ONLY
    fields = {name: field for name, field in option_fields(model).items() if name != OPTIONS}
    shown = [
        inspect.Parameter(name, kind, default=each.get_default(call_default_factory=True), annotation=each.annotation)
        for name, each in fields.items()
    ]
    either = Mapping[str, Any] | model | None if OPTIONS in model.model_fields else model | None
    return [*shown, inspect.Parameter(OPTIONS, kind, default=None, annotation=either)]


def _documentation(model: type[Options]) -> str:
    """What the options are, each in a line, for the docstring of the function."""
    fields = {name: field for name, field in option_fields(model).items() if name != OPTIONS}
    mapping = "other options as a mapping, or " if OPTIONS in model.model_fields else ""
    lines = [f"    {name}: {field.description}" for name, field in fields.items()]
    lines.append(f"    {OPTIONS}: {mapping}all of these as one `{model.__name__}`.")
    return "\n".join([inspect.cleandoc(model.__doc__ or ""), "", "Options:", *lines])

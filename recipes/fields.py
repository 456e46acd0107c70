"""Models of options, one field per option: the command line's flags, Python's keywords and YAML's keys come from the fields.

A field has a type, a default, perhaps bounds, and a description, which is the flag's help. What only the command line needs
stands in a `Flag` in the field's annotation.
"""

import difflib
import inspect
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator
from pydantic.fields import FieldInfo

from ..errors import UsageError

FLAGS = {"flags": True}  # the validation context in which errors name the flag instead of the keyword


@dataclass(frozen=True)
class Flag:
    """How an option looks on the command line.

    names      its spellings; default: `--` and the field's name. `--symmetric/--asymmetric` sets a bool to True or False
    metavar    the placeholder of its value in the help
    separated  several values are given at once, separated by commas, instead of by repeating the flag
    by_set     the option has no flag of its own: `--set NAME=VALUE` reaches it
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    separated: bool = False
    by_set: bool = False


class Options(BaseModel):
    """Base of the models: frozen, without unknown fields. Creating one raises `UsageError` if a value is not possible."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def _raise_usage_errors(cls, value: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise _as_usage_error(cls, error, bool(info.context)) from error

    def as_dict(self) -> dict[str, Any]:
        """Every option, for JSON and YAML."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in option_fields(type(self)) if name in values}


def option_fields(model: type[Options]) -> dict[str, FieldInfo]:
    """The fields of a model by name: its own first, then those that it inherits."""
    names = [name for each in model.__mro__ for name in inspect.get_annotations(each)]
    return {name: model.model_fields[name] for name in names if name in model.model_fields}


def flag_of(field: FieldInfo) -> Flag:
    """How the option looks on the command line."""
    return next((each for each in field.metadata if isinstance(each, Flag)), Flag())


def flag_name(model: type[Options], name: str, value: object = None) -> str:
    """The flag that sets the option `name`, such as `--seq-len`; for False the second one of two, `--asymmetric`."""
    flag = flag_of(model.model_fields[name])
    if flag.by_set:
        return f"--set {name}"
    spelled = flag.names[0] if flag.names else f"--{name.replace('_', '-')}"
    first, _, second = spelled.partition("/")
    return second if second and value is False else first


def _as_usage_error(model: type[Options], error: ValidationError, flags: bool) -> UsageError:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "the options"
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, model.model_fields, n=2, cutoff=0.5)
        known = ", ".join(option_fields(model))
        return UsageError(
            f"there is no option {name!r}", f"did you mean {' or '.join(close)}?" if close else f"options: {known}"
        )
    shown = flag_name(model, name) if flags and name in model.model_fields else name
    if first["type"] == "missing":
        return UsageError(f"{shown} is missing")
    wrong = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    wrong = f"must{wrong.removeprefix('should')}" if wrong.startswith("should") else f"is wrong: {wrong}"
    return UsageError(f"{shown} {wrong}, got {first['input']!r}")

"""The methods that a command offers."""

from ...errors import UsageError
from ..methods import Family, Method, method_names
from ..methods import method as find_method


def find_offered(name: str, command: str, *families: Family) -> Method:
    """The method called `name`. Raises `UsageError` if there is none, or if `command` does not offer it."""
    found, names = find_method(name), method_names(*families)
    if name not in names:
        raise UsageError(f"{name} is not a method of compress {command}", f"use one of: {', '.join(names)}")
    return found

"""The methods that a command offers."""

from ...errors import UsageError
from ..methods import METHODS, Method
from ..methods import method as find_method

REFINE = {"lorc"}  # refines the result of the pass before it, so it cannot be the only method


def offered(*families: str) -> list[str]:
    """The names of the methods of some families that `--method` takes."""
    return [
        name for name, (module, _) in METHODS.items() if module.partition(".")[0] in families and name not in REFINE
    ]


def find_offered(name: str, command: str, *families: str) -> Method:
    """The method called `name`. Raises `UsageError` if there is none, or if `command` does not offer it."""
    found, names = find_method(name), offered(*families)
    if name not in names:
        raise UsageError(f"{name} is not a method of compress {command}", f"use one of: {', '.join(names)}")
    return found

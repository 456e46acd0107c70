"""The methods that a command offers, for its help."""

from ..methods import METHODS

REFINE = {"lorc"}  # improves on the pass before it, so it cannot be the only method


def offered(*families: str) -> list[str]:
    """The names of the methods of some families that `--method` takes."""
    return [
        name for name, (module, _) in METHODS.items() if module.partition(".")[0] in families and name not in REFINE
    ]

"""lmpress: compress language models with calibration, and trust the result.

    import lmpress
    lmpress.quantize("path/to/model", "path/to/out", method="gptq", bits=4)
    model = lmpress.load("path/to/out")

Importing the package is cheap: a name below brings its module along when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compress.api import distill, prune, quantize, run
    from .compress.export import export
    from .compress.load import load
    from .compress.methods.prune.classifier import prune_classifier
    from .compress.methods.prune.networks import optimal_brain_damage, optimal_brain_surgeon
    from .errors import CompressError, StorageError, UsageError
    from .eval.perplexity import evaluate
    from .eval.verify import verify

__all__ = [
    "CompressError",
    "StorageError",
    "UsageError",
    "distill",
    "evaluate",
    "export",
    "load",
    "optimal_brain_damage",
    "optimal_brain_surgeon",
    "prune",
    "prune_classifier",
    "quantize",
    "run",
    "verify",
]

_HOMES = {
    "CompressError": "errors",
    "StorageError": "errors",
    "UsageError": "errors",
    "distill": "compress.api",
    "evaluate": "eval.perplexity",
    "export": "compress.export",
    "load": "compress.load",
    "optimal_brain_damage": "compress.methods.prune.networks",
    "optimal_brain_surgeon": "compress.methods.prune.networks",
    "prune": "compress.api",
    "prune_classifier": "compress.methods.prune.classifier",
    "quantize": "compress.api",
    "run": "compress.api",
    "verify": "eval.verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

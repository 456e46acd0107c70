"""The default name of a result, from what is asked."""

from pathlib import Path

from .methods import AFTER_TRANSFORM
from .schema import PassSpec, Recipe
from .scheme.prune_args import Pruning


def default_out(model: str | Path, recipe: Recipe) -> Path:
    """`MODEL-<methods>-w<bits>`, `-s<percent>` or `-2of4` next to the model; in the working directory if it is from the Hub.

    Passes that refine what the previous one left are not named: `--quality` does not change where a result lies.
    """
    names = [entry.method for entry in recipe.passes if not refines_previous(entry)]
    methods = "-".join(names[:-1] if len(names) > 1 and names[-1] == AFTER_TRANSFORM else names)
    return next_to(model, f"{methods}-{_amount(recipe)}")


def next_to(model: str | Path, suffix: str) -> Path:
    """`MODEL-<suffix>` next to the model; in the working directory if it is from the Hub."""
    path = Path(model)
    return path.resolve().parent / f"{path.resolve().name}-{suffix}" if path.exists() else Path(f"{path.name}-{suffix}")


def refines_previous(entry: PassSpec) -> bool:
    """Whether the pass has no scheme of its own and works on what the previous one left."""
    return entry.method_entry.refines


def _amount(recipe: Recipe) -> str:
    scheme, allocation = recipe.scheme, recipe.allocate
    if isinstance(scheme, Pruning):
        args = scheme.weights
        amount = f"s{100 * args.sparsity:g}" + (f"-{args.pattern}" if args.block > 1 else "")
        if args.n_of_m is not None:
            amount = "{}of{}".format(*args.n_of_m)
        return f"{amount}-allocated" if allocation else amount
    bits = scheme.weights.bits if allocation is None else allocation.average
    return f"w{bits:g}" + (f"a{scheme.inputs.bits}" if scheme.inputs else "")

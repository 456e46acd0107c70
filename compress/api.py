"""The Python API: the options of the command line as keywords."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack, overload

from ..errors import UsageError
from ..recipes import chain
from ..recipes.chain import Chain
from ..recipes.keywords import takes
from ..recipes.naming import next_to
from ..recipes.options.distill import DistillOptions
from ..recipes.options.prune import PruneOptions
from ..recipes.options.quantize import QuantizeOptions
from ..recipes.schema import Recipe
from .chain import ChainReport
from .chain import run as run_chain
from .report.progress import Observer, silent
from .run import Run, RunReport
from .structured import pipeline as structured
from .structured.pipeline import DistillReport


class RunKeywords(TypedDict, total=False):
    """The keywords of `run` for every recipe."""

    overwrite: bool
    device: str
    observer: Observer


class RecipeKeywords(RunKeywords, total=False):
    """The keywords of `run` for a recipe that is not a chain."""

    target: Sequence[str]


@takes(QuantizeOptions)
def quantize(
    model: str | Path,
    out: str | Path | None = None,
    *,
    options: QuantizeOptions,
    target: Sequence[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> RunReport:
    """Quantize the linear layers of `model` (directory or hub id) into the directory `out`.

    `out` is by default `MODEL-<method>-w<bits>` next to the model. `target` names the runtimes that must be able to serve the
    result (see `compress/runtime_support.py`). Raises `UsageError` before anything is written, `CompressError` later.
    """
    return run(model, out, options.recipe(), target=target, overwrite=overwrite, device=device, observer=observer)


@takes(PruneOptions)
def prune(
    model: str | Path,
    out: str | Path | None = None,
    *,
    options: PruneOptions,
    target: Sequence[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> RunReport:
    """Prune the linear layers of `model` (directory or hub id) into the directory `out`.

    `out` is by default `MODEL-<method>-s<percent>` next to the model. `target` names the runtimes that must be able to serve
    the result. Raises `UsageError` before anything is written, `CompressError` later.
    """
    return run(model, out, options.recipe(), target=target, overwrite=overwrite, device=device, observer=observer)


@takes(DistillOptions)
def distill(
    model: str | Path,
    out: str | Path | None = None,
    *,
    options: DistillOptions,
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> DistillReport:
    """Remove layers and channels of `model`, then recover accuracy by distillation, into the directory `out`.

    `out` is by default `MODEL-distill` next to the model. Raises `UsageError` before anything is written, `CompressError`
    later.
    """
    place = next_to(model, "distill") if out is None else Path(out)
    return structured.distill(model, place, options, overwrite=overwrite, device=device, observer=observer)


@overload
def run(model: str | Path, out: str | Path | None, recipe: Chain, **keywords: Unpack[RunKeywords]) -> ChainReport: ...


@overload
def run(model: str | Path, out: str | Path | None, recipe: Recipe, **keywords: Unpack[RecipeKeywords]) -> RunReport: ...


@overload
def run(
    model: str | Path,
    out: str | Path | None = None,
    recipe: Recipe | Chain | str | Path = "gptq-w4",
    **keywords: Unpack[RecipeKeywords],
) -> RunReport | ChainReport: ...


def run(
    model: str | Path,
    out: str | Path | None = None,
    recipe: Recipe | Chain | str | Path = "gptq-w4",
    *,
    target: Sequence[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> RunReport | ChainReport:
    """Run `recipe` on `model` (directory or hub id): a recipe or a chain of them, a YAML file or the name of a shipped one.

    `target` is for recipes alone: what a chain runs on is decided by its `export` stage. Raises `UsageError` before anything is
    written, `CompressError` later.
    """
    wanted = recipe if isinstance(recipe, Recipe | Chain) else chain.read(recipe)
    if isinstance(wanted, Recipe):
        ready = Run.of(model, wanted, out, targets=target, device=device, overwrite=overwrite)
        return ready.execute(observer)
    if target:
        raise UsageError("target does not apply to a chain", "end the chain with an export stage")
    place = chain.default_out(model, wanted) if out is None else Path(out)
    return run_chain(model, place, wanted, overwrite=overwrite, device=device, observer=observer)

"""The Python API: the command line's words as arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..errors import UsageError
from ..recipes.naming import _beside, default_out
from ..recipes.options import pruning_recipe, quantization_recipe
from ..recipes.schema import Recipe
from ..recipes.training import DistillConfig
from . import pipeline
from .allocation.allocate import decided
from .pipeline import RunReport
from .report.progress import Observer, silent
from .structured import pipeline as structured
from .structured.pipeline import DistillReport, Reduction
from .structured.width import Width
from .workspace import check_target

if TYPE_CHECKING:
    from ..recipes.chain import Chain
    from .chain import ChainReport


def quantize(
    model: str | Path,
    out: str | Path | None = None,
    *,
    method: str = "gptq",
    bits: int | None = None,
    average_bits: float | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    quality: str = "balanced",
    calib: str = "python-stdlib",
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    keep: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    target: Sequence[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> RunReport:
    """Quantize the linear layers of `model` (directory or hub id) into the directory `out`.

    With `average_bits` instead of `bits`, layers get different ones: as many on average on disk, scales included, where they
    matter most, which is measured first (see `compress/allocation/allocate.py`).
    Where `bits`, `group_size` or `symmetric` are not given the method decides: 4 bits in symmetric groups of 128 (SpQR: 32),
    for `awq` asymmetric ones, for `nf4` blocks of 64, for `smoothquant` 8 bits with one scale per output row (which is what
    `group_size` -1 means) and 8-bit inputs. A transform (`awq`, `smoothquant`, `rotate`) is followed by rounding to nearest.
    `keep` are patterns of layers that stay dense; `quality` is the method's preset (`fast` as published, `balanced` the best
    that the solver alone can do, `best` with block tuning behind it, except for what has no plain codes), over which
    `options` go: those of the method (`damping`, `order`, ...), of its weight grid (`observer`, `formula`, `scale_dtype`,
    `outliers`) and its inputs (`threshold`), and `level` (O1, O2, O3: SmoothQuant's). `target` names the runtimes that must be
    able to serve the result (see `formats/targets.py`). `out` is by default `MODEL-<method>-w<bits>` beside the model. Raises
    `UsageError` before anything is written, `CompressError` later.
    """
    recipe = quantization_recipe(
        method=method,
        bits=bits,
        average_bits=average_bits,
        group_size=group_size,
        symmetric=symmetric,
        quality=quality,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        keep=keep,
        options=options,
    )
    return run(model, out, recipe, target=target, overwrite=overwrite, device=device, observer=observer)


def prune(
    model: str | Path,
    out: str | Path | None = None,
    *,
    method: str = "exactobs",
    sparsity: float | None = None,
    pattern: str | None = None,
    allocate: bool = False,
    format: str = "dense",  # noqa: A002
    calib: str = "python-stdlib",
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    keep: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> RunReport:
    """Prune the linear layers of `model` (directory or hub id) into the directory `out`.

    `sparsity` is the share of the weights that goes (0.5 where neither it nor a pattern is given), a `pattern` such as
    `2:4` the zeros in every group of columns, `1x4` the columns that go together (ExactOBS). With `allocate` the sparsity is
    that of all layers together, each having as much of it as it bears best, which is measured first. `format` `dense` loads
    anywhere and saves no byte, `bitmask` and `2:4` are smaller and load with `lmpress.load`. `options` are those of the
    method (`damping`, `refit`, ...), of the choice of weights (`scope`) and of the stored values (`dtype`). `out` is by
    default `MODEL-<method>-s<percent>` beside the model.
    Raises `UsageError` before anything is written, `CompressError` later.
    """
    recipe = pruning_recipe(
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        allocate=allocate,
        format=format,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        keep=keep,
        options=options,
    )
    return run(model, out, recipe, overwrite=overwrite, device=device, observer=observer)


@overload
def run(
    model: str | Path,
    out: str | Path | None,
    recipe: "Chain",
    *,
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> "ChainReport": ...


@overload
def run(
    model: str | Path,
    out: str | Path | None,
    recipe: Recipe,
    *,
    target: Sequence[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> RunReport: ...


@overload
def run(
    model: str | Path,
    out: str | Path | None = None,
    recipe: "Recipe | Chain | str | Path" = "gptq-w4",
    *,
    target: Sequence[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> "RunReport | ChainReport": ...


def run(
    model: str | Path,
    out: str | Path | None = None,
    recipe: "Recipe | Chain | str | Path" = "gptq-w4",
    *,
    target: Sequence[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> "RunReport | ChainReport":
    """Carry out `recipe` on `model`: a recipe or a chain of them, a YAML file or the name of a shipped one; see `quantize`.

    `target` is for recipes alone: what a chain is to run on is the business of its `export`.
    """
    from ..recipes import chain
    from .chain import run as run_chain

    wanted = recipe if isinstance(recipe, Recipe | chain.Chain) else chain.read(recipe)
    if isinstance(wanted, chain.Chain):
        if target:
            raise UsageError("a chain has no target", "end it with an export")
        place = Path(out) if out else chain.default_out(model, wanted)
        return run_chain(model, place, wanted, overwrite=overwrite, device=device, observer=observer)
    place = Path(out) if out else default_out(model, wanted)
    check_target(place, overwrite)
    with decided(model, place, wanted, device, observer) as final:
        return pipeline.run(model, place, final, targets=target, overwrite=overwrite, device=device, observer=observer)


def distill(
    model: str | Path,
    out: str | Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    keep_layers: int | None = None,
    drop: float | None = None,
    choice: str = "greedy",
    mlp_width: float | None = None,
    kv_heads: int | None = None,
    hidden_size: float | None = None,
    teacher: str | Path | None = None,
    data: str = "python-stdlib",
    samples: int = 4096,
    seq_len: int = 512,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> DistillReport:
    """Leave layers and channels of `model` out and teach the rest to predict as before, into the directory `out`.

    `layers` stay, or as many as `keep_layers`, or all but `drop` (below 1: a share), chosen by `choice`; the MLPs keep
    `mlp_width` inner channels (below 1: a share), the attention `kv_heads` key-value heads, the residual stream `hidden_size`
    channels (below 1: a share), the rest refitted by least squares.
    With nothing of it `model` itself is taught, by `teacher`. `options` are those of the training (`DistillConfig`).
    Raises `UsageError`, `CompressError`.
    """
    width = Width(mlp_width, kv_heads)
    reduction = Reduction(
        None if layers is None else tuple(layers), keep_layers, drop, choice, width=width, hidden=hidden_size
    )
    unknown = [name for name in options or {} if name not in {entry.name for entry in fields(DistillConfig)}]
    if unknown:
        raise UsageError(f"distill has no option {unknown[0]!r}", "see compress distill --help")
    config = DistillConfig(**(options or {}))
    place = Path(out) if out else _beside(model, "distill")
    return structured.distill(
        model,
        place,
        reduction,
        config,
        teacher=teacher,
        data=data,
        samples=samples,
        seq_len=seq_len,
        overwrite=overwrite,
        device=device,
        observer=observer,
    )

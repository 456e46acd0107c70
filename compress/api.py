"""The Python API: the command line's words as arguments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes import schema
from ..recipes.schema import Recipe
from . import pipeline
from .pipeline import RunReport
from .report.progress import Observer, silent
from .scheme import group_strategy


def quantize(
    model: str | Path,
    out: str | Path | None = None,
    *,
    method: str = "gptq",
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
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
    """Quantize the linear layers of `model` (directory or hub id) into the directory `out`.

    Where `bits`, `group_size` and `symmetric` are not given the method decides: 4 bits in symmetric groups of 128, for `awq`
    asymmetric ones, for `smoothquant` 8 bits, one scale per row, and 8-bit inputs. `group_size` -1 means one scale per row; `keep` are patterns of layers that stay dense; `options` are those of
    the method (`damping`, `order`, ...) and of its weight grid (`observer`, `formula`, `scale_dtype`). `out` is by default
    `MODEL-<method>-w<bits>` beside the model. Raises `UsageError` before anything is written, `CompressError` later.
    """
    recipe = quantization_recipe(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        keep=keep,
        options=options,
    )
    return run(model, out, recipe, overwrite=overwrite, device=device, observer=observer)


def run(
    model: str | Path,
    out: str | Path | None = None,
    recipe: Recipe | str | Path = "gptq-w4",
    *,
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> RunReport:
    """Carry out `recipe` (a recipe, a YAML file or the name of a shipped one) on `model`; see `quantize`."""
    wanted = recipe if isinstance(recipe, Recipe) else schema.read(recipe)
    target = Path(out) if out else default_out(model, wanted)
    return pipeline.run(model, target, wanted, overwrite=overwrite, device=device, observer=observer)


def quantization_recipe(
    *,
    method: str = "gptq",
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    calib: str = "python-stdlib",
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    keep: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of `quantize`. Raises `UsageError` for values that cannot be."""
    strategy, size = group_strategy(group_size)
    grid, rest = _split(options or {})
    weights = {"bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": size, **grid}
    return schema.build(
        {
            "passes": [{"method": method, "scheme": {"weights": weights}, **rest}],
            "calibration": {"data": calib, "samples": samples, "seq_len": seq_len},
            "keep": list(keep),
            "seed": seed,
        },
        "quantize",
    )


def default_out(model: str | Path, recipe: Recipe) -> Path:
    """`MODEL-<methods>-w<bits>` beside the model; for a hub id, in the working directory."""
    path = Path(model)
    methods = "-".join(entry.method for entry in recipe.passes)
    name = f"{path.resolve().name if path.exists() else path.name}-{methods}-w{recipe.scheme.weights.bits}"
    return path.resolve().parent / name if path.exists() else Path(name)


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the weight grid, and those of the method."""
    grid = {name: value for name, value in options.items() if name in ("observer", "formula", "scale_dtype")}
    return grid, {name: value for name, value in options.items() if name not in grid}

"""The Python API: the command line's words as arguments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes import schema
from ..recipes.schema import Recipe
from . import passes, pipeline
from .pipeline import RunReport
from .progress import Observer, silent
from .scheme import group_strategy


def quantize(
    model: str | Path,
    out: str | Path | None = None,
    *,
    method: str = "gptq",
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    quality: str = "balanced",
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

    `group_size` is by default the method's own (128; 32 for SpQR), -1 means one scale per output row; `keep` are patterns
    of layers that stay dense; `quality` is the method's preset (`fast` as published, `balanced`, `best`), over which
    `options` go: those of the method (`damping`, `order`, ...) and of its weight grid (`observer`, `formula`,
    `scale_dtype`, `outliers`). `out` is by default `MODEL-<method>-w<bits>` beside the model. Raises `UsageError` before
    anything is written, `CompressError` later.
    """
    recipe = quantization_recipe(
        method=method,
        bits=bits,
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
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    quality: str = "balanced",
    calib: str = "python-stdlib",
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    keep: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of `quantize`. Raises `UsageError` for values that cannot be."""
    preset = dict(passes.method(method).preset(quality))
    own_size = preset.pop("group_size", 128)
    strategy, size = group_strategy(own_size if group_size is None else group_size)
    grid, rest = _split({**preset, **(options or {})})
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
    names = ("observer", "formula", "scale_dtype", "symmetric", "outliers")
    grid = {name: value for name, value in options.items() if name in names}
    return grid, {name: value for name, value in options.items() if name not in grid}

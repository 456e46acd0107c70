"""From the words of the command line to recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import UsageError
from . import schema
from .methods import method as find_method
from .schema import Recipe
from .scheme import LEVELS, Scheme, group_strategy, kinds

INPUT_OPTIONS = ("threshold",)
GRID_OPTIONS = ("observer", "formula", "scale_dtype", "symmetric", "outliers")


def quantization_recipe(
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
) -> Recipe:
    """The recipe of `quantize`. Raises `UsageError` for values that cannot be."""
    if bits is not None and average_bits is not None:
        raise UsageError("bits and average bits contradict each other", "give one of them")
    known = find_method(method)
    preset = dict(known.preset(quality))
    own_size = preset.pop("group_size", None)
    size = own_size if group_size is None else group_size
    level, others = _split({**preset, **(options or {})}, ("level",))
    of_inputs, others = _split(others, INPUT_OPTIONS)
    grid, rest = _split(others, GRID_OPTIONS)
    usual = _level(level["level"]) if level else known.scheme
    asked: dict[str, Any] = {k: v for k, v in {"bits": bits, "symmetric": symmetric}.items() if v is not None}
    if size is not None:
        flat = usual.weights.strategy == "flat"
        asked["strategy"], asked["group_size"] = ("flat", size) if flat else group_strategy(size)
    scheme = asdict(usual) | {"weights": asdict(usual.weights) | asked | grid}
    if of_inputs:
        if usual.inputs is None:
            raise UsageError(f"{method} leaves the inputs as they are: no {', '.join(of_inputs)}", "use llm-int8")
        scheme["inputs"] = asdict(usual.inputs) | of_inputs
    quantizer = {"method": method if known.compresses else "rtn", "scheme": scheme}
    solved = [quantizer | rest] if known.compresses else [{"method": method, **rest}, quantizer]
    weights = scheme["weights"]  # nothing but plain codes can be trained
    plain = usual.weights.kind == kinds.PLAIN and weights["scale_dtype"] != "bilevel" and weights["formula"] != "ggml"
    trained = quality == "best" and plain
    return schema.build(
        {
            "passes": [*solved, {"method": "tune"}] if trained else solved,
            "calibration": {"data": calib, "samples": samples, "seq_len": seq_len},
            "keep": list(keep),
            "seed": seed,
            "allocate": None if average_bits is None else {"average": average_bits},
        },
        "quantize",
    )


def pruning_recipe(
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
) -> Recipe:
    """The recipe of `prune`. Raises `UsageError` for values that cannot be."""
    if sparsity is not None and pattern is not None and ":" in pattern:
        raise UsageError("a pattern has its own sparsity", "give --sparsity or --pattern, not both")
    chosen, rest = _split(options or {}, ("scope", "dtype"))
    weights = {"sparsity": 0.5 if sparsity is None else sparsity, "pattern": pattern, "storage": format, **chosen}
    return schema.build(
        {
            "passes": [{"method": method, "scheme": {"weights": weights}, **rest}],
            "calibration": {"data": calib, "samples": samples, "seq_len": seq_len},
            "keep": list(keep),
            "seed": seed,
            "allocate": {} if allocate else None,
        },
        "prune",
    )


def _level(name: str) -> Scheme:
    if name not in LEVELS:
        raise UsageError(f"unknown level {name!r}", f"use one of: {', '.join(LEVELS)}")
    return LEVELS[name]


def _split(options: Mapping[str, Any], of_weights: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the weight arguments, and those of the method."""
    chosen = {name: value for name, value in options.items() if name in of_weights}
    return chosen, {name: value for name, value in options.items() if name not in chosen}

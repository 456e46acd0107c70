"""Recipes: an ordered list of passes and what they calibrate on. YAML, flags and Python arguments are the same schema."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_serializer, model_validator

from ..errors import UsageError
from .methods import Method, PassConfig, method
from .scheme import QuantArgs, Scheme, WeightArgs
from .scheme.prune_args import Pruning


class Calibration(BaseModel):
    """The rows of tokens that statistics are gathered on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "python-stdlib"
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=2048, ge=2)


class Allocation(BaseModel):
    """A budget that the layers share, spent where it does most good (see `compress/allocation/allocate.py`).

    `average` is in bits a weight on disk, scales included, or the share of zeros when pruning (None: that of the scheme);
    `levels` are what a layer may get (none given: all bits, sparsities around the average); `tokens` of the calibration text
    are measured on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    average: float | None = Field(default=None, gt=0)
    levels: tuple[float, ...] = ()
    tokens: int = Field(default=2048, ge=2)


class PassSpec(BaseModel):
    """One pass: the name of a method, and its options as that method's own config. Written flat: `{method: gptq, ...}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    method: str
    config: Any

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "config" in value:
            return value
        if not isinstance(value.get("method"), str):
            raise UsageError("a pass of the recipe names no method", "write `method: gptq` or another one")
        options = {name: option for name, option in value.items() if name != "method"}
        return {"method": value["method"], "config": configure(value["method"], options)}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        options = TypeAdapter(type(self.config)).dump_python(self.config, mode="json")
        return {"method": self.method, **options}

    @cached_property
    def method_entry(self) -> Method:
        """The method that carries the pass out."""
        return method(self.method)


class Recipe(BaseModel):
    """What a run does. `keep` are patterns of layers that stay dense; `overrides` change the weight arguments of layers by
    pattern, later patterns over earlier ones. `allocate` lets the layers share a budget. `embedding` is how the table of
    embeddings and the head are rounded to nearest (None: they stay as they are)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: tuple[PassSpec, ...] = Field(min_length=1)
    calibration: Calibration = Calibration()
    keep: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = {}
    seed: int = 0
    allocate: Allocation | None = None
    embedding: QuantArgs | None = None

    @model_validator(mode="after")
    def _transforms_come_first(self) -> "Recipe":
        last = self.passes[-1]
        if not last.method_entry.compresses:
            raise UsageError(
                f"{last.method} alone stores nothing smaller", "add a pass behind it, such as `method: rtn`"
            )
        for before, after in pairwise(self.passes):
            if before.method_entry.compresses and not after.method_entry.compresses:
                raise UsageError(
                    f"{after.method} comes after {before.method}", "transform weights before compressing them"
                )
        if sum(entry.method_entry.apply_outside is not None for entry in self.passes) > 1:
            raise UsageError("only one pass can turn the whole model", "leave out all but one")
        compressors = [entry for entry in self.passes if entry.method_entry.compresses]
        if compressors[0].config.scheme is None:
            raise UsageError(
                f"{compressors[0].method} has nothing to improve on", "put a quantizer such as gptq before it"
            )
        _check_two_levels(compressors)
        return self

    @property
    def scheme(self) -> Scheme | Pruning:
        """The scheme that the passes leave behind: that of the last one which has one."""
        schemes = [entry.config.scheme for entry in self.passes if entry.method_entry.compresses]
        return next(scheme for scheme in reversed(schemes) if scheme is not None)

    def weights(self, layer: str) -> WeightArgs | None:
        """How the layer's weight is to be compressed before that is fitted to its width; None where it is kept dense."""
        if any(fnmatch(layer, pattern) for pattern in self.keep):
            return None
        args = self.scheme.weights
        for pattern, changes in self.overrides.items():
            if fnmatch(layer, pattern):
                args = _replaced(args, changes, pattern)
        return args


OF_BLOCKS = ("gptq", "obq", "rtn")  # the methods that solve on any grid


def _check_two_levels(passes: Sequence[PassSpec]) -> None:
    """Raise `UsageError` where a pass is to leave scales that are quantized themselves and cannot."""
    for entry in passes:
        scheme = entry.config.scheme
        if not isinstance(scheme, Scheme):
            continue
        if scheme.weights.scale_dtype == "bilevel" and entry.method != "spqr":
            raise UsageError(f"{entry.method} leaves no two-level scales", "use method spqr, or scale_dtype float16")
        if scheme.weights.block and entry.method not in OF_BLOCKS:
            raise UsageError(f"{entry.method} leaves no GGUF blocks", f"use method {', '.join(OF_BLOCKS)}")
        if scheme.weights.block and not scheme.weights.symmetric and scheme.weights.scale_dtype == "float16":
            raise UsageError(f"{scheme.weights.block} is read, not solved", "use scale_dtype=super, or symmetric")


def configure(name: str, options: Mapping[str, Any]) -> PassConfig:
    """The config of the method `name` with `options`. Raises `UsageError` for unknown or unfit options."""
    known = method(name)
    for option in options:
        if option not in known.options():
            raise UsageError(f"{name} has no option {option!r}", _suggest(option, known.options()))
    try:
        config: PassConfig = TypeAdapter[Any](known.config).validate_python(dict(options))
    except ValidationError as error:
        raise as_usage_error(error, name) from error
    return config


def parse(text: str, where: str) -> Recipe:
    """The recipe in the YAML `text`; `where` names it in errors. Raises `UsageError`."""
    return build(_mapping(text, where), where)


def build(content: Mapping[str, Any], where: str = "the recipe") -> Recipe:
    """The recipe that a mapping describes. Raises `UsageError`."""
    if "stages" in content:
        raise UsageError(f"{where} is a chain of stages", "carry it out with: compress run --recipe")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise as_usage_error(error, where) from error


def read(name: str | Path) -> Recipe:
    """The recipe in a YAML file, or the shipped one of that name. Raises `UsageError`."""
    return build(*content(name))


def content(name: str | Path) -> tuple[Mapping[str, Any], str]:
    """What stands in a YAML file or the shipped recipe of that name, and what errors call it. Raises `UsageError`."""
    file = Path(name)
    if file.is_file():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8", "a recipe is a YAML file; see: compress recipes list") from error
        return _mapping(text, str(file)), str(file)
    if str(name) in shipped():
        return _mapping(shipped()[str(name)], f"recipe {name}"), f"recipe {name}"
    raise UsageError(f"{name}: no such recipe", _suggest(str(name), list(shipped())))


def _mapping(text: str, where: str) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise UsageError(f"{where} is no recipe", "it must be a mapping with a list `passes`")
    return found


def shipped() -> dict[str, str]:
    """The recipes that come with lmpress: name -> YAML text."""
    folder = files(__package__ or "lmpress.recipes")
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in found}


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every option written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _replaced(args: WeightArgs, changes: Mapping[str, Any], pattern: str) -> WeightArgs:
    unknown = changes.keys() - type(args).__dataclass_fields__.keys()
    if unknown:
        raise UsageError(f"override {pattern!r} sets {', '.join(sorted(unknown))}, which weights do not have")
    try:
        return replace(args, **changes)
    except ValidationError as error:
        raise as_usage_error(error, f"override {pattern!r}") from error


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def as_usage_error(error: ValidationError, where: str) -> UsageError:
    """The first thing that pydantic found wrong, in one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return UsageError(f"{where}: {place or 'value'}: {first['msg'].lower()}")

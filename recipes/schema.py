"""Recipes: an ordered list of passes and what they calibrate on. YAML, flags and Python arguments are the same schema."""

import difflib
from collections.abc import Mapping
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
from .methods import AFTER_TRANSFORM, Family, Method, PassConfig, method, method_names
from .parsing import parse_yaml, readable
from .scheme import PruneArgs, QuantArgs, Scheme, WeightArgs
from .scheme.kind_names import GGUF_BLOCKS, PRUNED
from .scheme.prune_args import Pruning


class Calibration(BaseModel):
    """The rows of tokens that statistics are collected on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "python-stdlib"
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=2048, ge=2)


class Allocation(BaseModel):
    """A budget that the layers share (see `compress/allocation/allocate.py`).

    average  bits per weight on disk, scales included; the share of zeros when pruning (None: that of the scheme)
    levels   the bits or sparsities that a layer may get (empty: all bits, or sparsities around the average)
    tokens   how many tokens of the calibration text the layers are measured on
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
            raise UsageError("a pass of the recipe has no method", "write for example `method: gptq`")
        options = {name: option for name, option in value.items() if name != "method"}
        return {"method": value["method"], "config": configure(value["method"], options)}

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        options = TypeAdapter(type(self.config)).dump_python(self.config, mode="json")
        return {"method": self.method, **options}

    @cached_property
    def method_entry(self) -> Method:
        """The registered method of the pass."""
        return method(self.method)


class Recipe(BaseModel):
    """What a run does.

    passes       the methods, in the order in which they are applied to every block
    calibration  the text that they see
    keep         patterns of layers that stay dense
    overrides    changes of the weight arguments by pattern of layers; a later pattern wins over an earlier one
    allocate     a budget that the layers share
    embedding    how the embedding and the head are rounded to nearest (None: they stay as they are)
    """

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
                f"{last.method} alone compresses nothing", f"add a pass after it, such as `method: {AFTER_TRANSFORM}`"
            )
        for before, after in pairwise(self.passes):
            if before.method_entry.compresses and not after.method_entry.compresses:
                raise UsageError(
                    f"{after.method} comes after {before.method}", "put transforms before the passes that compress"
                )
        if sum(entry.method_entry.apply_outside is not None for entry in self.passes) > 1:
            raise UsageError("only one pass can transform the whole model", "leave out all but one")
        first = self._compressors[0]
        if first.method_entry.refines:
            quantizers = ", ".join(method_names(Family.QUANTIZE))
            raise UsageError(f"{first.method} has nothing to improve on", f"put a quantizer before it: {quantizers}")
        for entry in self._compressors:
            _check_supported(entry, (entry.config.scheme or self.scheme).weights)
        return self

    @property
    def _compressors(self) -> list[PassSpec]:
        return [entry for entry in self.passes if entry.method_entry.compresses]

    @property
    def solver(self) -> PassSpec:
        """The pass whose scheme the result has: the last one with a scheme of its own."""
        return next(entry for entry in reversed(self._compressors) if not entry.method_entry.refines)

    @property
    def scheme(self) -> Scheme | Pruning:
        """The scheme of the result."""
        return self.solver.config.scheme

    def weights(self, layer: str) -> WeightArgs | None:
        """How the layer's weight is to be compressed before that is fitted to its width; None if it is kept dense.

        Raises `UsageError` if an override asks for what a pass cannot make.
        """
        if any(fnmatch(layer, pattern) for pattern in self.keep):
            return None
        args = self.scheme.weights
        for pattern, changes in self.overrides.items():
            if fnmatch(layer, pattern):
                args = _replaced(args, changes, pattern)
        if args is not self.scheme.weights:
            for entry in self._compressors:
                _check_supported(entry, args)
        return args


def _check_supported(entry: PassSpec, args: WeightArgs) -> None:
    """Raise `UsageError` if the pass can neither make nor improve on weights of these arguments."""
    known = entry.method_entry
    kind = PRUNED if isinstance(args, PruneArgs) else args.kind
    if not known.supports(kind):
        words = f"improve on {kind}" if known.refines else f"make {kind}"
        raise UsageError(f"{entry.method} does not {words} weights", _alternative(known, kind))
    if isinstance(args, PruneArgs):
        _check_blocks(entry, args)
    elif kind == GGUF_BLOCKS and not args.symmetric and args.scale_dtype == "float16":
        raise UsageError(f"{args.block} can be read, not quantized to", "use scale_dtype=super, or symmetric blocks")


def _check_blocks(entry: PassSpec, args: PruneArgs) -> None:
    if args.block > 1 and not entry.method_entry.prunes_blocks:
        able = [name for name in method_names(Family.PRUNE) if method(name).prunes_blocks]
        raise UsageError(f"{entry.method} does not prune in blocks", f"use method {' or '.join(able)}")


def _alternative(known: Method, kind: str) -> str:
    """What to do if the method does not support weights of that kind."""
    if known.refines:
        able = [name for name in method_names(Family.QUANTIZE) if known.improves_on(method(name))]
        return f"put it after {' or '.join(able)}"
    able = [name for name in method_names(Family.QUANTIZE, Family.PRUNE) if method(name).supports(kind)]
    return f"use method {' or '.join(able)}"


def configure(name: str, options: Mapping[str, Any]) -> PassConfig:
    """The config of the method `name` with `options`. Raises `UsageError` for unknown options and wrong values."""
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
        raise UsageError(f"{where} is a chain of stages", "run it with: compress run MODEL --recipe FILE")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise as_usage_error(error, where) from error


def read(name: str | Path) -> Recipe:
    """The recipe in a YAML file, or the shipped one of that name. Raises `UsageError`."""
    return build(*content(name))


def content(name: str | Path) -> tuple[Mapping[str, Any], str]:
    """The content of a YAML file or of the shipped recipe of that name, and its name in errors. Raises `UsageError`."""
    file = Path(name)
    if file.is_file():
        try:
            with readable(file):
                text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8", "a recipe is a YAML file; see: compress recipes list") from error
        return _mapping(text, str(file)), str(file)
    if str(name) in shipped():
        return _mapping(shipped()[str(name)], f"recipe {name}"), f"recipe {name}"
    raise UsageError(f"{name}: no such recipe", _suggest(str(name), list(shipped())))


def _mapping(text: str, where: str) -> Mapping[str, Any]:
    try:
        found = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{where} is not valid YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise UsageError(f"{where} is not a recipe", "it must be a mapping with a list `passes`")
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
    """The first error that pydantic found, in one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return UsageError(f"{where}: {place or 'value'}: {first['msg'].lower()}")

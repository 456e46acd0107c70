"""Chains: recipes of stages (`distill`, `compress`, `export`), each carried out on what the one before left.

The stages work in a hidden sibling of the target, each into a directory of the name that it would have by hand
(`MODEL-distill-gptq-w4`). These stay until the last one is there: a run that was killed goes on at the stage, and inside the
stage, where it stopped.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_serializer, model_validator

from ..errors import CompressError, UsageError
from . import schema
from .naming import default_out as default_out_of_recipe
from .schema import Recipe
from .scheme.prune_args import Pruning
from .training import DistillConfig

KINDS = ("distill", "compress", "export")
# What `compress export` can write; compress/export.py has a writer for each.
FORMATS = (
    "pack-quantized",
    "gptq",
    "gptq_v2",
    "awq",
    "bitsandbytes",
    "fp32",
    "fp16",
    "bf16",
    "gguf",
    "onnx",
    "openvino",
)


class Distillation(BaseModel):
    """The words of `compress distill`, those of the training (`DistillConfig`) among them: written flat, kept in `options`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[int, ...] | None = None
    keep_layers: int | None = None
    drop: float | None = None
    choice: str = "greedy"
    mlp_width: float | None = None
    kv_heads: int | None = None
    hidden_size: float | None = None
    teacher: str | None = None
    data: str = "python-stdlib"
    samples: int = 4096
    seq_len: int = 512
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Mapping[str, Any]) -> dict[str, Any]:
        names = {entry.name for entry in fields(DistillConfig)}
        config = TypeAdapter(DistillConfig).validate_python({k: v for k, v in value.items() if k in names})
        return {k: v for k, v in value.items() if k not in names} | {"options": asdict(config)}

    @model_serializer(mode="wrap")
    def _flat(self, dump: Any) -> dict[str, Any]:
        words = dump(self)
        return words | words.pop("options")


class Export(BaseModel):
    """The runtime's format that `compress export` writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str

    @model_validator(mode="after")
    def _known(self) -> "Export":
        if self.format not in FORMATS:
            raise UsageError(f"unknown format {self.format!r}", f"formats: {', '.join(FORMATS)}")
        return self


@dataclass(frozen=True)
class Chain:
    """The stages in their order, each what it is asked."""

    stages: tuple[Distillation | Recipe | Export, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON and YAML, every option written out."""
        return {"stages": [{kind_of(stage): stage.model_dump(mode="json")} for stage in self.stages]}

    def names(self, base: str) -> list[str]:
        """The directory of each stage's result, for a model called `base`."""
        found = []
        for stage in self.stages:
            if isinstance(stage, Recipe):
                base = default_out_of_recipe(base, stage).name
            else:
                base = f"{base}-distill" if isinstance(stage, Distillation) else f"{base}-{stage.format}"
            found.append(base)
        return found


def kind_of(stage: Distillation | Recipe | Export) -> str:
    """The word that the stage stands under in YAML."""
    return "compress" if isinstance(stage, Recipe) else "distill" if isinstance(stage, Distillation) else "export"


def read(name: str | Path) -> Recipe | Chain:
    """The recipe, or the chain of them, in a YAML file or of a shipped name. Raises `UsageError`."""
    content, where = schema.content(name)
    return build(content, where) if "stages" in content else schema.build(content, where)


def build(content: Mapping[str, Any], where: str = "the recipe") -> Chain:
    """The chain that a mapping describes. Raises `UsageError`, which names the stage at fault."""
    entries = content["stages"]
    if len(content) > 1 or not isinstance(entries, list) or not entries:
        raise UsageError(f"{where} is no chain", "give it a list `stages` and nothing else")
    stages = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in KINDS:
            raise UsageError(
                f"{where}: stage {number} is none of {', '.join(KINDS)}", "write `- distill: {drop: 0.25}`"
            )
        kind, asked = next(iter(entry.items()))
        with named(number, kind):
            stages.append(_stage(kind, asked, where))
    for number, (before, after) in enumerate(pairwise(stages), start=2):
        dense = isinstance(before, Distillation) or (
            isinstance(before, Recipe)
            and isinstance(before.scheme, Pruning)
            and before.scheme.weights.storage == "dense"
        )
        if not dense and not (isinstance(before, Recipe) and isinstance(after, Export)):
            raise UsageError(
                f"stage {number} ({kind_of(after)}) cannot work on what stage {number - 1} ({kind_of(before)}) leaves",
                "quantize behind all that changes the model, and export last",
            )
    return Chain(tuple(stages))


def dump(chain: Chain) -> str:
    """The chain as YAML, every option written out."""
    return yaml.safe_dump(chain.as_dict(), sort_keys=False, allow_unicode=True)


def default_out(model: str | Path, chain: Chain) -> Path:
    """Beside the model under the name of the last stage; for a hub id, in the working directory."""
    path = Path(model)
    return (path.resolve().parent if path.exists() else Path()) / chain.names(base_name(model))[-1]


def _stage(kind: str, asked: Any, where: str) -> Distillation | Recipe | Export:
    if not isinstance(asked, Mapping):
        raise UsageError(f"{asked!r} says nothing", "write what is asked as NAME: VALUE")
    if kind == "compress":
        return schema.build(asked, where)
    try:
        return Distillation.model_validate(asked) if kind == "distill" else Export.model_validate(asked)
    except ValidationError as error:
        raise schema.as_usage_error(error, where) from error


def base_name(model: str | Path) -> str:
    path = Path(model)
    return path.resolve().name if path.exists() else path.name


@contextmanager
def named(number: int, kind: str) -> Iterator[None]:
    """Put the stage's name in front of an error."""
    try:
        yield
    except CompressError as error:
        raise type(error)(f"stage {number} ({kind}): {error.message}", error.hint) from error

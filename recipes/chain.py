"""Chains: recipes of stages (`distill`, `compress`, `export`), each of which works on the result of the previous one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from ..errors import CompressError, UsageError
from . import schema
from .fields import Options
from .naming import default_out as default_out_of_recipe
from .options.distill import DistillOptions
from .schema import Recipe
from .scheme.prune_args import Pruning

KINDS = ("distill", "compress", "export")
# What `compress export` can write; compress/export.py has a writer for each.
Format = Literal[
    "pack-quantized", "gptq", "gptq_v2", "awq", "bitsandbytes", "fp32", "fp16", "bf16", "gguf", "onnx", "openvino"
]


class Export(Options):
    """The options of an `export` stage."""

    format: Format = Field(description="What `compress export` writes.")


@dataclass(frozen=True)
class Chain:
    """The stages in their order."""

    stages: tuple[DistillOptions | Recipe | Export, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON and YAML, every option written out."""
        return {"stages": [{kind_of(stage): _as_dict(stage)} for stage in self.stages]}

    def names(self, base: str) -> list[str]:
        """The directory of each stage's result, for a model called `base`."""
        found = []
        for stage in self.stages:
            if isinstance(stage, Recipe):
                base = default_out_of_recipe(base, stage).name
            else:
                base = f"{base}-distill" if isinstance(stage, DistillOptions) else f"{base}-{stage.format}"
            found.append(base)
        return found


def kind_of(stage: DistillOptions | Recipe | Export) -> str:
    """The key of the stage in YAML."""
    return "compress" if isinstance(stage, Recipe) else "distill" if isinstance(stage, DistillOptions) else "export"


def read(name: str | Path) -> Recipe | Chain:
    """The recipe, or the chain of them, in a YAML file or of a shipped name. Raises `UsageError`."""
    content, where = schema.content(name)
    return build(content, where) if "stages" in content else schema.build(content, where)


def build(content: Mapping[str, Any], where: str = "the recipe") -> Chain:
    """The chain that a mapping describes; `where` names it in errors. Raises `UsageError`, which names the stage at fault."""
    entries = content["stages"]
    if len(content) > 1 or not isinstance(entries, list) or not entries:
        raise UsageError(f"{where} is not a chain", "a chain is a list `stages` and nothing else")
    stages = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in KINDS:
            raise UsageError(
                f"{where}: stage {number} must be one of {', '.join(KINDS)}, got {entry!r}",
                "write for example `- distill: {drop: 0.25}`",
            )
        kind, asked = next(iter(entry.items()))
        with named(number, kind):
            stages.append(_stage(kind, asked, where))
    for number, (before, after) in enumerate(pairwise(stages), start=2):
        dense = isinstance(before, DistillOptions) or (
            isinstance(before, Recipe)
            and isinstance(before.scheme, Pruning)
            and before.scheme.weights.storage == "dense"
        )
        if not dense and not (isinstance(before, Recipe) and isinstance(after, Export)):
            raise UsageError(
                f"stage {number} ({kind_of(after)}) cannot work on the result of stage {number - 1} ({kind_of(before)})",
                "quantize after all stages that change the model, and export last",
            )
    return Chain(tuple(stages))


def dump(chain: Chain) -> str:
    """The chain as YAML, every option written out."""
    return yaml.safe_dump(chain.as_dict(), sort_keys=False, allow_unicode=True)


def default_out(model: str | Path, chain: Chain) -> Path:
    """Next to the model, with the name of the last stage; in the working directory if the model is from the Hub."""
    path = Path(model)
    return (path.resolve().parent if path.exists() else Path()) / chain.names(base_name(model))[-1]


def _stage(kind: str, asked: Any, where: str) -> DistillOptions | Recipe | Export:
    if not isinstance(asked, Mapping):
        raise UsageError(f"{asked!r} is not a mapping of options", "write them as NAME: VALUE")
    if kind == "compress":
        return schema.build(asked, where)
    return DistillOptions.model_validate(asked) if kind == "distill" else Export.model_validate(asked)


def _as_dict(stage: DistillOptions | Recipe | Export) -> dict[str, Any]:
    return stage.model_dump(mode="json") if isinstance(stage, Recipe) else stage.as_dict()


def base_name(model: str | Path) -> str:
    """What the names of the results begin with."""
    path = Path(model)
    return path.resolve().name if path.exists() else path.name


@contextmanager
def named(number: int, kind: str) -> Iterator[None]:
    """Put the number and kind of the stage in front of an error's message."""
    try:
        yield
    except CompressError as error:
        raise type(error)(f"stage {number} ({kind}): {error.message}", error.hint) from error

"""Chains: recipes of stages (`distill`, `compress`, `export`), each carried out on what the one before left.

The stages work in a hidden sibling of the target, each into a directory of the name that it would have by hand
(`MODEL-distill-gptq-w4`). These stay until the last one is there: a run that was killed goes on at the stage, and inside the
stage, where it stopped.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_serializer, model_validator

from ..calibrate.source import open_source
from ..compress import api
from ..compress.distill.knowledge import Lessons
from ..compress.errors import CompressError, UsageError
from ..compress.export import WEIGHTS, WHOLE_FILES, export, formats
from ..compress.formats.shards import storage_errors
from ..compress.prune.args import Pruning
from ..compress.report.progress import Event, Observer, silent
from ..compress.workspace import check_target, put_in_place
from ..eval.perplexity import Evaluation, evaluate
from . import schema
from .schema import Recipe

KINDS = ("distill", "compress", "export")
MANIFEST, RECORD = "manifest.json", "stages.json"


class Distillation(BaseModel):
    """The words of `compress distill`, those of the training (`Lessons`) among them: written flat, kept in `options`."""

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
        names = {entry.name for entry in fields(Lessons)}
        lessons = TypeAdapter(Lessons).validate_python({k: v for k, v in value.items() if k in names})
        return {k: v for k, v in value.items() if k not in names} | {"options": asdict(lessons)}

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
        if self.format not in formats():
            raise UsageError(f"unknown format {self.format!r}", f"formats: {', '.join(formats())}")
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
                base = api.default_out(base, stage).name
            else:
                base = f"{base}-distill" if isinstance(stage, Distillation) else f"{base}-{stage.format}"
            found.append(base)
        return found


@dataclass(frozen=True)
class ChainReport:
    """What a chain did: for every stage its kind, directory name, bytes of weights, seconds, and the verdict on it if any.

    `evaluation` was made of the stage `evaluated`, the last one that `load` reads: a GGUF or ONNX file holds the same codes
    and scales as what it was exported from.
    """

    out: Path
    stages: list[dict[str, Any]]
    bytes_before: int
    bytes_after: int
    seconds: float
    evaluation: Evaluation | None = None
    evaluated: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        measured = {} if self.evaluation is None else {"evaluation": self.evaluation.as_dict()}
        return known | {"out": str(self.out)} | measured


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
        with _named(number, kind):
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
    return (path.resolve().parent if path.exists() else Path()) / chain.names(_base(model))[-1]


def run(
    model: str | Path,
    out: Path,
    chain: Chain,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    evaluate_on: str | None = None,
    observer: Observer = silent,
) -> ChainReport:
    """Carry out the stages one after the other, from `model` into the directory `out`, and evaluate the result if asked to.

    Raises what a stage raises, with the stage's name in front; finished stages are kept then.
    """
    started = time.monotonic()
    check_target(out, overwrite)
    source = open_source(model)
    work, names = out.parent / f".{out.name}.chain", chain.names(_base(model))
    _prepare(work, chain, source.fingerprint, names, overwrite)
    previous: str | Path = model
    records, served = [], previous
    for number, (stage, name) in enumerate(zip(chain.stages, names, strict=True), start=1):
        place = work / name
        if not place.exists():
            observer(Event("warning", message=f"stage {number} of {len(names)}: {kind_of(stage)}"))
            with _named(number, kind_of(stage), work):
                figures = _carry_out(stage, previous, place, device, observer)
            (work / f"{number}.json").write_text(json.dumps(figures))
        note = work / f"{number}.json"
        known = json.loads(note.read_text()) if note.exists() else {}
        records.append({"stage": kind_of(stage), "name": name, "bytes": _weights(place), **known})
        served = previous if isinstance(stage, Export) and stage.format in WHOLE_FILES else place
        previous = place
    last, seconds = Path(previous), time.monotonic() - started
    report = ChainReport(out, records, source.nbytes, _weights(last), seconds)
    if evaluate_on is not None:
        found = evaluate(served, evaluate_on, against=model, device=device, progress=observer)
        report = replace(report, evaluation=found, evaluated=Path(served).name)
    with storage_errors(out):
        (last / RECORD).write_text(json.dumps(chain.as_dict() | {"done": records}, indent=2) + "\n")
        put_in_place(last, out)
        shutil.rmtree(work)
    observer(Event("done"))
    return report


def _stage(kind: str, asked: Any, where: str) -> Distillation | Recipe | Export:
    if not isinstance(asked, Mapping):
        raise UsageError(f"{asked!r} says nothing", "write what is asked as NAME: VALUE")
    if kind == "compress":
        return schema.build(asked, where)
    try:
        return Distillation.model_validate(asked) if kind == "distill" else Export.model_validate(asked)
    except ValidationError as error:
        raise schema.as_usage_error(error, where) from error


def _carry_out(
    stage: Distillation | Recipe | Export, model: str | Path, place: Path, device: str, observer: Observer
) -> dict[str, Any]:
    """Carry one stage out, going on where it stopped; seconds, and the verdict if there is one."""
    if isinstance(stage, Export):
        return {"seconds": export(model, place, format=stage.format).seconds}
    if isinstance(stage, Recipe):
        report = api.run(model, place, stage, device=device, observer=observer)
        return {"seconds": report.seconds, "verdict": report.verdict.word}
    words = {name: getattr(stage, name) for name in type(stage).model_fields}
    return {"seconds": api.distill(model, place, **words, device=device, observer=observer).seconds}


def _prepare(work: Path, chain: Chain, fingerprint: str, names: list[str], overwrite: bool) -> None:
    """The folder of this request, with what an unfinished run left of the same stages.

    Stages that are not finished may differ from that run's; raises `UsageError` where finished ones do.
    """
    versions = {name: version(name) for name in ("lmpress", "torch", "transformers")}
    manifest = {"source": fingerprint, "versions": versions, **chain.as_dict()}
    found = work / MANIFEST
    known = json.loads(found.read_text()) if found.exists() else manifest
    finished = sum((work / name).exists() for name in names)
    same = all(known[key] == manifest[key] for key in ("source", "versions"))
    if not (same and known["stages"][:finished] == manifest["stages"][:finished]):
        if not overwrite:
            raise UsageError(
                f"{work} holds an unfinished run with other settings", "repeat those, or discard it: --overwrite"
            )
        shutil.rmtree(work)
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        half = work / f"{MANIFEST}.partial"
        half.write_text(json.dumps(manifest, indent=2))
        half.replace(found)


@contextmanager
def _named(number: int, kind: str, work: Path | None = None) -> Iterator[None]:
    """Put the stage's name in front of an error; a `work` folder in which nothing is begun or finished goes with it."""
    try:
        yield
    except CompressError as error:
        if work is not None and not any(path.is_dir() for path in work.iterdir()):
            shutil.rmtree(work)
        raise type(error)(f"stage {number} ({kind}): {error.message}", error.hint) from error


def _base(model: str | Path) -> str:
    path = Path(model)
    return path.resolve().name if path.exists() else path.name


def _weights(folder: Path) -> int:
    """Bytes of the weight files in a directory."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)

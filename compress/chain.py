"""Running a chain: each stage works on the result of the previous one.

The stages work in a hidden sibling of the target, each into a directory with the name that its command would give it
(`MODEL-distill-gptq-w4`). These stay until the last one is complete: a run that was interrupted continues at the stage, and
inside the stage, at which it stopped.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..calibrate.model.safetensors_io import storage_errors, write_text
from ..calibrate.model.source import Source
from ..errors import CompressError, UsageError
from ..recipes.chain import Chain, Export, base_name, kind_of, named
from ..recipes.options.distill import DistillOptions
from ..recipes.schema import Recipe
from .export import WHOLE_FILES, export
from .formats.source import open_source
from .output.record import weight_files
from .output.target import (
    MANIFEST,
    claimed,
    exists_already,
    is_published,
    make_private,
    publish,
    remove_working,
    sibling,
)
from .report.progress import Event, Observer, silent
from .run import Run
from .structured import pipeline as structured
from .workspace import REPORT

STAGES = "stages.json"


@dataclass(frozen=True)
class ChainReport:
    """What a chain did: for every stage its kind, directory name, bytes of weights, seconds, and its verdict if it has one.

    `evaluation` is that of the stage `evaluated`, the last one that `load` reads: a GGUF or ONNX file holds the same codes
    and scales as what it was exported from.
    """

    out: Path
    stages: list[dict[str, Any]]
    bytes_before: int
    bytes_after: int
    seconds: float
    evaluation: dict[str, Any] | None = None
    evaluated: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None} | {"out": str(self.out)}


def run(
    model: str | Path,
    out: Path,
    chain: Chain,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    evaluate: Callable[[Path], dict[str, Any]] | None = None,
    observer: Observer = silent,
) -> ChainReport:
    """Run the stages one after the other, from `model` into the directory `out`, and `evaluate` the last one that `load` reads,
    if `evaluate` is given.

    Raises what a stage raises, with the stage's name in front; finished stages are kept then.
    """
    started = time.monotonic()
    source, names = open_source(model), chain.names(base_name(model))
    manifest = _manifest(chain, source)
    with claimed(out, overwrite, source.path):
        if out.exists() and not overwrite:
            return _published(out, chain, names, manifest, source.nbytes, evaluate)
        work = sibling(out, "chain")
        _prepare(work, manifest, names, overwrite)
        records = _run_stages(model, chain, names, work, device, observer)
        last = work / names[-1]
        report = ChainReport(out, records, source.nbytes, _weights(last), time.monotonic() - started)
        if evaluate is not None:
            served = _served(model, chain, names, work)
            report = replace(report, evaluation=evaluate(served), evaluated=served.name)
        with storage_errors(out):
            done = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
            write_text(last / STAGES, json.dumps(chain.as_dict() | {"done": done}, indent=2) + "\n")
            publish(last, out, _request(manifest))
            remove_working(work)
    observer(Event("done"))
    return report


def _run_stages(
    model: str | Path, chain: Chain, names: list[str], work: Path, device: str, observer: Observer
) -> list[dict[str, Any]]:
    """Run the stages that are not finished in the folder `work`; what is known of every stage."""
    previous, records = model, []
    for number, (stage, name) in enumerate(zip(chain.stages, names, strict=True), start=1):
        place, note = work / name, _note(work, number)
        if not place.exists():
            observer(Event("warning", message=f"stage {number} of {len(names)}: {kind_of(stage)}"))
            with named(number, kind_of(stage)), _removed_if_empty(work):
                figures = _run_stage(stage, previous, place, device, observer)
            write_text(note, json.dumps(figures))
        elif not note.exists():  # an earlier run was stopped in between
            write_text(note, json.dumps(_verdict(stage, place)))
        records.append(
            {"stage": kind_of(stage), "name": name, "bytes": _weights(place), **json.loads(note.read_text())}
        )
        previous = place
    return records


def _served(model: str | Path, chain: Chain, names: list[str], work: Path) -> Path:
    """The last result that `load` reads, or the model itself."""
    for stage, name in zip(reversed(chain.stages), reversed(names), strict=True):
        if not (isinstance(stage, Export) and stage.format in WHOLE_FILES):
            return work / name
    return Path(model)


def _published(
    out: Path,
    chain: Chain,
    names: list[str],
    manifest: dict[str, Any],
    nbytes: int,
    evaluate: Callable[[Path], dict[str, Any]] | None,
) -> ChainReport:
    """The report of a run that was stopped after it gave `out` its name, whose working folder is removed.

    It is evaluated if `load` reads it. Raises `UsageError` if `out` is another result.
    """
    if not is_published(out, _request(manifest)):
        raise exists_already(out)
    records = json.loads((out / STAGES).read_text())["done"]
    report = ChainReport(out, records, nbytes, _weights(out), 0.0)
    last = chain.stages[-1]
    if evaluate is not None and not (isinstance(last, Export) and last.format in WHOLE_FILES):
        report = replace(report, evaluation=evaluate(out), evaluated=names[-1])
    remove_working(sibling(out, "chain"))
    return report


def _run_stage(
    stage: DistillOptions | Recipe | Export, model: str | Path, place: Path, device: str, observer: Observer
) -> dict[str, Any]:
    """Run one stage, from where it stopped if it was interrupted; its seconds, and its verdict if it has one."""
    if isinstance(stage, Export):
        return {"seconds": export(model, place, format=stage.format).seconds}
    if isinstance(stage, Recipe):
        report = Run.of(model, stage, place, device=device).execute(observer)
        return {"seconds": report.seconds, "verdict": report.verdict.word}
    return {"seconds": structured.distill(model, place, stage, device=device, observer=observer).seconds}


def _verdict(stage: DistillOptions | Recipe | Export, place: Path) -> dict[str, Any]:
    """The verdict of a finished stage, if it has one."""
    if not isinstance(stage, Recipe):
        return {}
    return {"verdict": json.loads((place / REPORT).read_text())["verdict"]}


def _manifest(chain: Chain, source: Source) -> dict[str, Any]:
    versions = {name: version(name) for name in ("lmpress", "torch", "transformers")}
    known = {"source": source.fingerprint, "companions": source.companions}
    return {**known, "versions": versions, **chain.as_dict()}


def _request(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _note(work: Path, number: int) -> Path:
    """The file that is written when stage `number` is finished."""
    return work / f"{number}.json"


def _prepare(work: Path, manifest: dict[str, Any], names: list[str], overwrite: bool) -> None:
    """Prepare the folder of this request, with what an unfinished run left of the same stages.

    Stages that are not finished may differ from that run's; raises `UsageError` if finished ones do.
    """
    with storage_errors(work):
        make_private(work)
        found = work / MANIFEST
        known = json.loads(found.read_text()) if found.exists() else manifest
        finished = sum((work / name).exists() for name in names)
        same = all(known.get(key) == manifest[key] for key in ("source", "companions", "versions"))
        if not (same and known["stages"][:finished] == manifest["stages"][:finished]):
            if not overwrite:
                raise UsageError(
                    f"{work} holds an unfinished run with other settings", "repeat those, or discard it: --overwrite"
                )
            remove_working(work)
            make_private(work)
        write_text(found, json.dumps(manifest, indent=2))


@contextmanager
def _removed_if_empty(work: Path) -> Iterator[None]:
    """After an error, remove the `work` folder if no stage has begun or finished in it."""
    try:
        yield
    except CompressError:
        if not any(path.is_dir() for path in work.iterdir()):
            shutil.rmtree(work)
        raise


def _weights(folder: Path) -> int:
    """Bytes of the weight files in a directory."""
    return sum(file.stat().st_size for file in weight_files(folder))

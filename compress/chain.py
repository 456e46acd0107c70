"""Running a chain: each stage works on the result of the previous one.

The stages work in a hidden sibling of the target, each into a directory with the name that its command would give it
(`MODEL-distill-gptq-w4`). These stay until the last one is complete: a run that was interrupted continues at the stage, and
inside the stage, at which it stopped.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..calibrate.model.safetensors_io import storage_errors
from ..errors import CompressError, UsageError
from ..recipes.chain import Chain, Export, base_name, kind_of, named
from ..recipes.options.distill import DistillOptions
from ..recipes.schema import Recipe
from .export import WEIGHTS, WHOLE_FILES, export
from .formats.source import open_source
from .report.progress import Event, Observer, silent
from .run import Run
from .structured import pipeline as structured
from .workspace import check_target, put_in_place

MANIFEST, RECORD = "manifest.json", "stages.json"


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
    check_target(out, overwrite)
    source = open_source(model)
    work, names = out.parent / f".{out.name}.chain", chain.names(base_name(model))
    _prepare(work, chain, source.fingerprint, names, overwrite)
    previous: str | Path = model
    records, served = [], previous
    for number, (stage, name) in enumerate(zip(chain.stages, names, strict=True), start=1):
        place = work / name
        if not place.exists():
            observer(Event("warning", message=f"stage {number} of {len(names)}: {kind_of(stage)}"))
            with named(number, kind_of(stage)), _removed_if_empty(work):
                figures = _run_stage(stage, previous, place, device, observer)
            (work / f"{number}.json").write_text(json.dumps(figures))
        note = work / f"{number}.json"
        known = json.loads(note.read_text()) if note.exists() else {}
        records.append({"stage": kind_of(stage), "name": name, "bytes": _weights(place), **known})
        served = previous if isinstance(stage, Export) and stage.format in WHOLE_FILES else place
        previous = place
    last, seconds = Path(previous), time.monotonic() - started
    report = ChainReport(out, records, source.nbytes, _weights(last), seconds)
    if evaluate is not None:
        report = replace(report, evaluation=evaluate(Path(served)), evaluated=Path(served).name)
    with storage_errors(out):
        (last / RECORD).write_text(json.dumps(chain.as_dict() | {"done": records}, indent=2) + "\n")
        put_in_place(last, out)
        shutil.rmtree(work)
    observer(Event("done"))
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


def _prepare(work: Path, chain: Chain, fingerprint: str, names: list[str], overwrite: bool) -> None:
    """Prepare the folder of this request, with what an unfinished run left of the same stages.

    Stages that are not finished may differ from that run's; raises `UsageError` if finished ones do.
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
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)

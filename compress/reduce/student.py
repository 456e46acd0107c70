"""`distill`: a smaller dense model out of a larger one, and the training that brings back what was lost.

Layers go, widths shrink, then the student learns from its teacher. Every stage leaves a whole checkpoint in a hidden sibling
of the target, the training its state, so that a run that was killed goes on from there.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...calibrate.discovery import find_blocks
from ...calibrate.rows import Rows, calibration_rows, context_length, load_tokenizer
from ...calibrate.skeleton import Names, build, device_of
from ...calibrate.source import Source, open_source
from ..distill.journal import Journal
from ..distill.knowledge import Course, Lessons, teach
from ..errors import UsageError
from ..formats.load import load
from ..formats.shards import storage_errors
from ..report.progress import Event, Observer, silent
from ..workspace import check_target, put_in_place
from .choice import choose
from .layers import check_layers, keep_layers, write_model

HELD_OUT = 16  # one row in so many is not trained on
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Reduction:
    """What goes. At most one of the first three: `layers` that stay, how many stay (`keep_layers`), or go (`drop`); `choice`
    says which ones (see choice.py)."""

    layers: tuple[int, ...] | None = None
    keep_layers: int | None = None
    drop: int | None = None
    choice: str = "greedy"
    choice_rows: int = 32

    def __post_init__(self) -> None:
        if sum(asked is not None for asked in (self.layers, self.keep_layers, self.drop)) > 1:
            raise UsageError("layers are chosen in two ways", "give one of --layers, --keep-layers and --drop")

    def wanted(self, layers: int) -> int | None:
        """How many of `layers` layers are to be chosen; None where none is."""
        if self.drop is not None:
            return layers - self.drop
        return self.keep_layers


@dataclass
class DistillReport:
    """What was made: the teacher's layers that stayed, parameters and bytes before and after, and how the training went."""

    out: Path
    kept: list[int]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    seconds: float
    course: Course = field(default_factory=Course)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"out": str(self.out)}


def distill(
    model: str | Path,
    out: Path,
    reduction: Reduction,
    lessons: Lessons,
    *,
    teacher: str | Path | None = None,
    data: str = "python-stdlib",
    samples: int = 2048,
    seq_len: int = 512,
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> DistillReport:
    """Reduce `model`, teach what is left on `samples` rows of `data`, and write it as a dense checkpoint into `out`.

    The teacher is `model` itself, or another one of the same vocabulary. Raises `UsageError` before anything is written.
    """
    started = time.monotonic()
    device_of(device)
    source = open_source(model)
    count = len(find_blocks(build(source))[1])
    if reduction.layers is not None:
        check_layers(reduction.layers, count)
    check_target(out, overwrite)
    rows = _rows(source, data, samples, seq_len, lessons.seed)
    work = out.parent / f".{out.name}.distill"
    _prepare(work, _manifest(source, teacher, reduction, lessons, rows), overwrite)
    kept = _reduced(work / "start", model, source, count, reduction, rows, device, observer)
    start = open_source(work / "start")
    course = Course()
    if lessons.steps:
        course = _taught(work, start, teacher or model, kept, rows, lessons, device, observer)
    report = DistillReport(
        out,
        kept,
        _parameters(source),
        _parameters(start),
        source.nbytes,
        start.nbytes,
        time.monotonic() - started,
        course,
    )
    complete = work / ("taught" if lessons.steps else "start")
    (complete / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    with storage_errors(out):
        put_in_place(complete, out)
        shutil.rmtree(work)
    observer(Event("done"))
    return report


def _rows(source: Source, data: str, samples: int, seq_len: int, seed: int) -> Rows:
    context = context_length(build(source).config)
    length = seq_len if context is None else min(seq_len, context)
    return calibration_rows(data, load_tokenizer(source.path), samples, length, seed, split="training")


def _manifest(
    source: Source, teacher: str | Path | None, reduction: Reduction, lessons: Lessons, rows: Rows
) -> dict[str, Any]:
    return {
        "source": source.fingerprint,
        "teacher": None if teacher is None else open_source(teacher).fingerprint,
        "reduction": asdict(reduction),
        "lessons": asdict(lessons),
        "rows": rows.fingerprint,
        "versions": {name: version(name) for name in ("lmpress", "torch", "transformers")},
    }


def _prepare(work: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """The folder of this request, with what an unfinished run of the same one left. Raises `UsageError` for another one."""
    text, found = json.dumps(manifest, indent=2, sort_keys=True), work / MANIFEST
    known = found.read_text() if found.exists() else ""
    if known not in ("", text) and not overwrite:
        raise UsageError(
            f"{work} holds an unfinished run with other settings", "repeat those, or discard it: --overwrite"
        )
    with storage_errors(work):
        if known != text:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        found.write_text(text)


def _reduced(
    place: Path,
    model: str | Path,
    source: Source,
    count: int,
    reduction: Reduction,
    rows: Rows,
    device: str,
    observer: Observer,
) -> list[int]:
    """Make the student at its start in `place`, or find it there; the teacher's layers in it."""
    note = place.parent / "kept.json"
    if place.exists() and note.exists():
        return json.loads(note.read_text())
    wanted = reduction.wanted(count)
    kept = list(reduction.layers or range(count))
    if wanted is not None:
        few = Rows(rows.ids[: reduction.choice_rows], rows.source, rows.vocabulary)
        kept = choose(reduction.choice, wanted, source, few, place.parent / "scratch", device, observer)
    note.write_text(json.dumps(kept))
    keep_layers(model, place, kept, overwrite=True)
    return kept


def _taught(
    work: Path,
    start: Source,
    teacher: str | Path,
    kept: Sequence[int],
    rows: Rows,
    lessons: Lessons,
    device: str,
    observer: Observer,
) -> Course:
    """Train the student at `start` and write it as it was best into `work/taught`."""
    student, master = load(start.path, device), load(teacher, device)
    _check_vocabularies(student, master)
    count = max(1, len(rows.ids) // HELD_OUT)
    layers = len(find_blocks(master)[1])
    pairs = [(new, old) for new, old in enumerate(kept) if old < layers]
    course = teach(student, master, rows.ids[count:], rows.ids[:count], pairs, lessons, Journal(work), observer)
    _write(work / "taught", start, student)
    return course


def _write(folder: Path, start: Source, student: PreTrainedModel) -> None:
    """The trained student with the names and dtypes of the checkpoint that it started from."""
    names = Names(student, start)
    parameters = {names.find(name): p.detach() for name, p in student.named_parameters()}
    if None in parameters:
        raise UsageError(f"{start.path} stores its tensors in another form than transformers trains them")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def read(name: str) -> torch.Tensor:
        found = parameters.get(name)
        return start.read(name) if found is None else found.cpu().to(start.tensors[name].spec.torch_dtype)

    write_model(folder, start, start.config, {name: t.spec for name, t in start.tensors.items()}, read)


def _parameters(source: Source) -> int:
    return sum(p.numel() for p in build(source).parameters())


def _check_vocabularies(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the student has {sizes[0]} tokens and the teacher {sizes[1]}", "give a teacher with the same tokenizer"
        )

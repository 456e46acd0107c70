"""`distill`: structured pruning of a model, and distillation that recovers its accuracy.

Layers are removed, then widths are pruned, then the student is trained to predict as its teacher does. Every stage writes a
whole checkpoint into a hidden folder next to the target, and the training its state, so that a killed run can be resumed.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from ...calibrate.data.token_rows import TokenRows, calibration_rows
from ...calibrate.model import safetensors_io
from ...calibrate.model.architecture import find_blocks
from ...calibrate.model.safetensors_io import storage_errors
from ...calibrate.model.skeleton import Names, build, context_length, device_of
from ...calibrate.model.source import Source
from ...errors import UsageError
from ...recipes.options.distill import DistillOptions
from ...recipes.training import DistillConfig
from ..distill.knowledge import TrainingHistory, train
from ..distill.training_state import TrainingState
from ..formats.source import open_source
from ..formats.tokenizer import load_tokenizer
from ..load import load
from ..output import target
from ..output.target import MANIFEST, sibling
from ..report.curve import save
from ..report.progress import Event, Observer, silent
from .drop_layers import check_layers, keep_layers, write_model
from .hidden_size import config_of_hidden_size, prune_hidden_size
from .layer_selection import check_selection, select_layers
from .sparse import is_sparse, refold, unfold
from .width import Width, config_of_width, prune_width

HELD_OUT = 16  # one row in this many is held out of the training
REPORT, PICTURE = "report.json", "loss.png"


@dataclass(frozen=True)
class Reduction:
    """What is removed: layers, then channels of the layers that stay.

    layers, keep_layers, drop  at most one of them: layers that stay, how many stay, how many are removed (below 1: which share)
    choice, choice_rows        how layers are selected (see layer_selection.py), and on how many rows
    width, width_rows          the width of the blocks (see width.py), and on how many rows they are refitted
    hidden                     channels of the residual stream that stay (below 1: that share; see hidden_size.py)
    """

    layers: tuple[int, ...] | None = None
    keep_layers: int | None = None
    drop: float | None = None
    choice: str = "greedy"
    choice_rows: int = 32
    width: Width = field(default_factory=Width)
    width_rows: int = 128
    hidden: float | None = None

    @classmethod
    def of(cls, options: DistillOptions) -> "Reduction":
        """What the options of `distill` ask for."""
        return cls(
            options.layers,
            options.keep_layers,
            options.drop,
            options.choice,
            width=Width(options.mlp_width, options.kv_heads),
            hidden=options.hidden_size,
        )

    def layers_to_keep(self, layers: int) -> int | None:
        """How many of `layers` layers are to be selected; None if no layer is removed or `layers` gives the numbers."""
        if self.drop is not None:
            return layers - round(self.drop * layers if self.drop < 1 else self.drop)
        return self.keep_layers

    @property
    def drops_layers(self) -> bool:
        """Whether layers are removed."""
        return any(asked is not None for asked in (self.layers, self.keep_layers, self.drop))

    @property
    def requested(self) -> bool:
        """Whether anything is removed."""
        return self.drops_layers or self.width.requested or self.hidden is not None


@dataclass
class DistillReport:
    """What was written: the layers that stayed, parameters and bytes before and after, and the course of the training."""

    out: Path
    kept: list[int]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0
    history: TrainingHistory = field(default_factory=TrainingHistory)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"out": str(self.out)}


def distill(
    model: str | Path,
    out: Path,
    options: DistillOptions,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = silent,
) -> DistillReport:
    """Reduce `model`, train the result to predict as the teacher does, and write it as a dense checkpoint into `out`.

    The teacher is `model` itself, or another one of the same vocabulary. If accelerate has launched several processes, the
    first one reduces and writes, and all of them train. Raises `UsageError` before anything is written.
    """
    started = time.monotonic()
    reduction, teacher = Reduction.of(options), options.teacher
    team = PartialState(cpu=device_of(device).type == "cpu")
    observer = observer if team.is_main_process else silent
    source = open_source(model)
    count = len(find_blocks(build(source))[1])
    packed = is_sparse(source)
    _check(reduction, options, source, count, teacher, packed)
    models = [source.path] if teacher is None else [source.path, open_source(teacher).path]
    with target.claimed(out, overwrite, *models) if team.is_main_process else nullcontext():
        rows = _rows(source, options.data, options.samples, options.seq_len, options.seed)
        manifest = json.dumps(_manifest(source, reduction, options, rows), indent=2, sort_keys=True)
        report = None if overwrite else _published(out, manifest, team)
        if report is None:
            with _working(out, manifest, overwrite, team) as work:
                report = _distilled(out, source, options, rows, work, device, observer)
        team.wait_for_everyone()
    observer(Event("done"))
    return replace(report, seconds=time.monotonic() - started)


def _distilled(
    out: Path, source: Source, options: DistillOptions, rows: TokenRows, work: Path, device: str, observer: Observer
) -> DistillReport:
    """Run the stages in the folder `work` and move the result to `out`."""
    team, packed = PartialState(), is_sparse(source)
    with team.main_process_first():  # the others find it done
        kept, student = _reduced(work, source, Reduction.of(options), rows, device, observer)
        start = unfold(source, work / "unfolded") if packed else open_source(student)
    history = TrainingHistory()
    if options.steps:
        teacher = options.teacher or source.path
        pupil, history = _taught(start, teacher, kept, rows, options, TrainingState(work), device, observer)
        student = work / "taught"
        if team.is_main_process:
            with storage_errors(student):
                shutil.rmtree(student, ignore_errors=True)
                student.mkdir()
                write = refold if packed else _write
                write(student, source if packed else start, pupil)
    parameters = _parameters(source), _parameters(start)
    report = DistillReport(out, kept, *parameters, source.nbytes, start.nbytes, history=history)
    if team.is_main_process:
        _finish(report, student, work, observer)
    return report


def _published(out: Path, manifest: str, team: PartialState) -> DistillReport | None:
    """The report of a run that was stopped after it gave `out` its name; None if there is no `out`. Removes the working folder.

    Raises `UsageError` if `out` is another result.
    """
    if not out.exists():
        return None
    if not target.is_published(out, _request(manifest)):
        raise target.exists_already(out)
    content = json.loads((out / REPORT).read_text())
    history = content.pop("history")
    curve = [(int(step), loss, kl) for step, loss, kl in history["curve"]]
    team.wait_for_everyone()
    if team.is_main_process:
        target.remove_working(sibling(out, "distill"))
    return DistillReport(out, **content, history=TrainingHistory(curve, history["best_step"]))


def _request(manifest: str) -> str:
    return hashlib.sha256(manifest.encode()).hexdigest()


def _reduced(
    work: Path, source: Source, reduction: Reduction, rows: TokenRows, device: str, observer: Observer
) -> tuple[list[int], Path]:
    """Run the stages of `reduction`; the numbers of the layers that stay, and the folder of the result."""
    count = len(find_blocks(build(source))[1])
    kept, student = list(range(count)), source.path
    if reduction.drops_layers:
        kept, student = _drop_layers(work, source, count, reduction, rows, device, observer)
    if reduction.width.requested:
        student = _prune_width(work, student, reduction, rows, device, observer)
    if reduction.hidden is not None:
        student = _prune_hidden_size(work, student, reduction, rows, device, observer)
    return kept, student


def _finish(report: DistillReport, student: Path, work: Path, observer: Observer) -> None:
    """Write report and picture next to the model at `student`, and move it to its final place."""
    history = report.history
    content = {name: value for name, value in report.as_dict().items() if name not in ("out", "seconds")}
    safetensors_io.write_text(student / REPORT, json.dumps(content, indent=2) + "\n")
    missing = save(history.curve, history.best_step, student / PICTURE) if history.curve else None
    if missing is not None:
        observer(Event("warning", message=missing))
    with storage_errors(report.out):
        target.publish(student, report.out, _request((work / MANIFEST).read_text()))
        target.remove_working(work)


def _check(
    reduction: Reduction, config: DistillConfig, source: Source, count: int, teacher: str | Path | None, packed: bool
) -> None:
    """Raise `UsageError` for requests that can be refused before anything is computed."""
    if not (reduction.requested or config.steps):
        raise UsageError("no reduction and no training requested", "give --drop, --mlp-width or --steps")
    if not reduction.requested and teacher is None:
        raise UsageError("the model would be its own teacher, unchanged", "give --teacher, --drop or --mlp-width")
    if packed and (reduction.requested or config.keep_zeros is False):
        raise UsageError(
            "the zeros of this model are packed: it cannot be reduced, and its zeros stay",
            "reduce first and prune the result",
        )
    if reduction.layers is not None:
        check_layers(reduction.layers, count)
    wanted = reduction.layers_to_keep(count)
    if wanted is not None:
        check_selection(reduction.choice, wanted, count)
    config_of_width(source, reduction.width)
    if reduction.hidden is not None:
        config_of_hidden_size(source, reduction.hidden)
        if config.hidden:
            raise UsageError("hidden states of different widths cannot be compared", "leave out --set hidden")
    if config.steps and not packed:
        _stored_names(build(source, split_experts=False), source)


def _rows(source: Source, data: str, samples: int, seq_len: int, seed: int) -> TokenRows:
    context = context_length(build(source).config)
    length = seq_len if context is None else min(seq_len, context)
    return calibration_rows(data, load_tokenizer(source.path), samples, length, seed, split="training")


def _manifest(source: Source, reduction: Reduction, options: DistillOptions, rows: TokenRows) -> dict[str, Any]:
    return {
        "source": source.fingerprint,
        "companions": source.companions,
        "teacher": None if options.teacher is None else open_source(options.teacher).fingerprint,
        "reduction": asdict(reduction),
        "training": options.training(),
        "rows": rows.fingerprint,
        "versions": {name: version(name) for name in ("lmpress", "torch", "transformers")},
    }


@contextmanager
def _working(out: Path, manifest: str, overwrite: bool, team: PartialState) -> Iterator[Path]:
    """The working folder of this request, with the stages that an unfinished run of the same request has written.

    Raises `UsageError` if a run with other settings is unfinished. The folder stays if the run ends early, unless the request
    turns out to be impossible.
    """
    work = sibling(out, "distill")
    found = work / MANIFEST
    with team.main_process_first(), storage_errors(work):
        target.make_private(work)
        known = found.read_text() if found.exists() else ""
        if known not in ("", manifest) and not overwrite:
            raise UsageError(
                f"{work} holds an unfinished run with other settings", "repeat those, or discard it: --overwrite"
            )
        if known != manifest:
            target.remove_working(work)
            target.make_private(work)
            safetensors_io.write_text(found, manifest)
    try:
        yield work
    except UsageError:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _drop_layers(
    work: Path, source: Source, count: int, reduction: Reduction, rows: TokenRows, device: str, observer: Observer
) -> tuple[list[int], Path]:
    """Remove layers unless an earlier run did; the numbers of the layers that stay, and the folder of the result."""
    place, note = work / "layers", work / "kept.json"
    if place.exists():
        return json.loads(note.read_text()), place
    wanted, kept = reduction.layers_to_keep(count), list(reduction.layers or ())
    if wanted is not None:
        few = _first(rows, reduction.choice_rows)
        kept = select_layers(reduction.choice, wanted, source, few, work / "scratch", device, observer)
    safetensors_io.write_text(note, json.dumps(kept))
    keep_layers(source.path, place, kept)
    return kept, place


def _prune_width(
    work: Path, model: Path, reduction: Reduction, rows: TokenRows, device: str, observer: Observer
) -> Path:
    """Prune the width of the blocks of `model` unless an earlier run did; the folder of the result."""
    place, few = work / "width", _first(rows, reduction.width_rows)
    if not place.exists():
        prune_width(model, place, reduction.width, few, device, observer=observer)
    return place


def _prune_hidden_size(
    work: Path, model: Path, reduction: Reduction, rows: TokenRows, device: str, observer: Observer
) -> Path:
    """Prune the hidden size of `model` unless an earlier run did; the folder of the result."""
    place = work / "hidden-size"
    if not place.exists():
        assert reduction.hidden is not None
        prune_hidden_size(model, place, reduction.hidden, _first(rows, reduction.width_rows), device, observer=observer)
    return place


def _first(rows: TokenRows, count: int) -> TokenRows:
    return TokenRows(rows.ids[:count], rows.source, rows.vocabulary)


def _taught(
    start: Source,
    teacher: str | Path,
    kept: Sequence[int],
    rows: TokenRows,
    config: DistillConfig,
    training_state: TrainingState,
    device: str,
    observer: Observer,
) -> tuple[PreTrainedModel, TrainingHistory]:
    """Train the student at `start`: the student at its best step, and the course of the training."""
    student, master = load(start.path, device), load(teacher, device)
    _check_vocabularies(student, master)
    count = max(1, len(rows.ids) // HELD_OUT)
    layers = len(find_blocks(master)[1])
    pairs = [(new, old) for new, old in enumerate(kept) if old < layers]
    history = train(student, master, rows.ids[count:], rows.ids[:count], pairs, config, training_state, observer)
    return student, history


def _write(folder: Path, start: Source, student: PreTrainedModel) -> None:
    """Write the trained student with the names and dtypes of the checkpoint that it started from."""
    stored, parameters = _stored_names(student, start), dict(student.named_parameters())
    trained = {stored[name]: parameter.detach() for name, parameter in parameters.items()}

    def read(name: str) -> torch.Tensor:
        found = trained.get(name)
        return start.read(name) if found is None else found.cpu().to(start.tensors[name].spec.torch_dtype)

    write_model(folder, start, start.config, {name: t.spec for name, t in start.tensors.items()}, read)


def _stored_names(model: PreTrainedModel, source: Source) -> dict[str, str]:
    """The checkpoint's name of each parameter of `model`. Raises `UsageError` if it stores one in another form."""
    names = Names(model, source)
    found = {name: names.find(name) for name, _ in model.named_parameters()}
    missing = next((name for name, stored in found.items() if stored is None), None)
    if missing is not None:
        raise UsageError(
            f"{source.path} stores {missing} in another form than transformers trains it (such as expert by expert)",
            "reduce it without training: --steps 0",
        )
    return {name: stored for name, stored in found.items() if stored is not None}


def _parameters(source: Source) -> int:
    return sum(p.numel() for p in build(source).parameters())


def _check_vocabularies(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the student has a vocabulary of {sizes[0]} tokens and --teacher one of {sizes[1]}",
            "give a teacher with the same tokenizer",
        )

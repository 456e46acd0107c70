"""Knowledge distillation: a whole student learns to predict what its teacher predicts.

The loss of a token is the cross entropy of the student's prediction under the teacher's (both at temperature `T`, times
`T**2`; Hinton et al. 2015), plus the distances of hidden states and of attention scores of paired layers (XTC, Wu et al.
2022). For a student that is its teacher the first is the teacher's entropy, the others are zero.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import PreTrainedModel

from ...calibrate.discovery import find_linears
from ..errors import CompressError, UsageError
from ..report.progress import Event, Observer, silent
from .adapters import attach
from .journal import Journal
from .watch import attention_scores, block_outputs

PRUNED = 0.1  # share of exact zeros from which a layer counts as pruned
ENDED = 4  # a run ends early when the held-out loss has not fallen for so many checks


@dataclass(frozen=True)
class Lessons:
    """How a student is taught.

    steps        updates at most; none leaves the student as it is
    batch        rows of an update; `accumulate` splits them into that many passes
    rate         AdamW's at its height: it rises over the first twentieth of the steps and falls to zero along a half cosine
    temperature  of both predictions
    hidden       weight of the hidden states' term: mean over layers and tokens of `|s - t|^2 / |t|^2`
    attention    weight of the attention scores' term: mean over layers of the mean squared difference
    keep_zeros   weights of linears that are zero at the start stay zero; None: in layers where at least a tenth are (pruned
                 models)
    lora         rank of the low-rank adapters that are trained in place of all parameters, and folded in at the end; 0: none
    checks       how often, evenly over the steps, the held-out rows are looked at and the state is saved
    precision    of the passes: no (that of the weights), bf16 or fp16
    """

    steps: int = 500
    batch: int = 16
    accumulate: int = 1
    rate: float = 5e-4
    temperature: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    keep_zeros: bool | None = None
    lora: int = 0
    checks: int = 10
    precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.checks < 1 or self.rate <= 0 or self.temperature <= 0:
            raise UsageError("distillation needs steps, checks, a rate and a temperature above 0", "see --help")
        if self.lora < 0:
            raise UsageError(f"adapters of rank {self.lora} are not possible", "use 8, or 0 to train all parameters")
        if self.batch < 1 or self.accumulate < 1 or self.batch % self.accumulate:
            raise UsageError(
                f"a batch of {self.batch} rows cannot be split into {self.accumulate} passes", "use a divisor"
            )
        if min(self.hidden, self.attention) < 0:
            raise UsageError("the weight of a term is negative", "use 0 to leave the term out")
        if self.precision not in ("no", "bf16", "fp16"):
            raise UsageError(f"unknown precision {self.precision!r}", "use no, bf16 or fp16")


@dataclass
class Course:
    """How a training went: held-out figures at every check, `[step, loss, kl]`, and the step whose weights were kept."""

    curve: list[tuple[int, float, float]] = field(default_factory=list)
    best_step: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Terms:
    """The parts of the loss, each a mean over tokens: `logits` is a cross entropy, `entropy` the teacher's own."""

    logits: Tensor
    entropy: Tensor
    hidden: Tensor
    attention: Tensor

    def loss(self, lessons: Lessons) -> Tensor:
        """The weighted sum."""
        return self.logits + lessons.hidden * self.hidden + lessons.attention * self.attention


def compare(
    student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, pairs: Sequence[tuple[int, int]], lessons: Lessons
) -> Terms:
    """The terms on the rows `ids` `[rows, length]`; `pairs` are student and teacher layers that belong together."""
    with torch.no_grad():
        theirs = _observed(teacher, ids, [layer for _, layer in pairs], lessons)
    ours = _observed(student, ids, [layer for layer, _ in pairs], lessons)
    wanted = (theirs[0].float() / lessons.temperature).log_softmax(-1)
    given = (ours[0].float() / lessons.temperature).log_softmax(-1)
    square = lessons.temperature**2
    zero = given.new_zeros(())
    hidden = [
        ((o.float() - t.float()).square().sum(-1) / t.float().square().sum(-1).clamp(min=1e-12)).mean()
        for o, t in zip(ours[1], theirs[1], strict=True)
    ]
    attention = [(ours[2][s] - theirs[2][t]).float().square().mean() for s, t in pairs if lessons.attention]
    return Terms(
        logits=-(wanted.exp() * given).sum(-1).mean() * square,
        entropy=-(wanted.exp() * wanted).sum(-1).mean() * square,
        hidden=torch.stack(hidden).mean() if hidden else zero,
        attention=torch.stack(attention).mean() if attention else zero,
    )


def teach(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Tensor,
    held_out: Tensor,
    pairs: Sequence[tuple[int, int]],
    lessons: Lessons,
    journal: Journal,
    observer: Observer = silent,
) -> Course:
    """Train the parameters of `student`, or adapters, on `rows` `[rows, length]`; it ends as it was best on `held_out` rows.

    Processes that accelerate has launched share the rows of every update and the held-out ones, and end with equal students.

    The state goes into `journal` at every check, and a run that finds one there goes on from it, to the same bits. Raises
    `CompressError` where the loss is no number, `UsageError` for adapters on a pruned student and for rows that cannot be
    shared out evenly.
    """
    accelerator = Accelerator(mixed_precision=lessons.precision, cpu=student.device.type == "cpu")
    _check_shares(lessons, accelerator.num_processes)
    own = slice(
        accelerator.process_index, None, accelerator.num_processes
    )  # the rows of a pass that are this process's
    masks = zeros(student, lessons)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    fold = attach(student, lessons.lora, lessons.seed) if lessons.lora else None
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimiser = AdamW(named.values(), lr=lessons.rate, weight_decay=0.0)
    course = Course()
    done = journal.resume(named, optimiser, course)
    if done == 0:
        _check(course, 0, student, teacher, held_out, pairs, lessons, accelerator)
        if accelerator.is_main_process:
            journal.keep_best(named)
    model, optimiser = accelerator.prepare(student, optimiser)
    every = max(1, math.ceil(lessons.steps / lessons.checks))
    for step in range(done + 1, lessons.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = lessons.rate * _schedule(step, lessons.steps)
        for part in _batch(rows, step, lessons).to(student.device).chunk(lessons.accumulate):
            with accelerator.autocast():
                loss = compare(model, teacher, part[own], pairs, lessons).loss(lessons) / lessons.accumulate
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        _keep_zero(named, masks)
        if step % every == 0 or step == lessons.steps:
            better = _check(course, step, student, teacher, held_out, pairs, lessons, accelerator)
            if better and accelerator.is_main_process:
                journal.keep_best(named)
            if accelerator.is_main_process:
                journal.save(step, named, optimiser, course)
            observer(Event("distill", step, lessons.steps, figures={"kl": course.curve[-1][2]}))
            if step - course.best_step >= ENDED * every:
                break
    accelerator.wait_for_everyone()
    journal.restore_best(named)
    if fold is not None:
        fold()
    return course


def _check_shares(lessons: Lessons, processes: int) -> None:
    rows = lessons.batch // lessons.accumulate
    if rows % processes:
        raise UsageError(
            f"{processes} processes cannot share {rows} rows evenly", "use a --batch that is a multiple of their number"
        )


def _observed(
    model: PreTrainedModel, ids: Tensor, layers: list[int], lessons: Lessons
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, outputs of the blocks `layers`, and the attention scores of all layers where they are compared."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    with block_outputs(inner, layers if lessons.hidden else []) as outputs:
        if not lessons.attention:
            return model(input_ids=ids, use_cache=False).logits, outputs, []
        with attention_scores(inner) as scores:
            return model(input_ids=ids, use_cache=False).logits, outputs, scores


@torch.no_grad()
def _check(
    course: Course,
    step: int,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    held_out: Tensor,
    pairs: Sequence[tuple[int, int]],
    lessons: Lessons,
    accelerator: Accelerator,
) -> bool:
    """Note the held-out loss and KL divergence at `step`, the same in all processes; whether it is the best so far."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in held_out[accelerator.process_index :: accelerator.num_processes].split(
        lessons.batch // lessons.accumulate
    ):
        terms = compare(student, teacher, part.to(student.device), pairs, lessons)
        sums += len(part) * torch.tensor([float(terms.loss(lessons)), float(terms.logits - terms.entropy)]).double()
    total = accelerator.reduce(sums.to(accelerator.device), "sum")
    assert isinstance(total, Tensor)
    loss, divergence = (total / len(held_out)).tolist()
    if not math.isfinite(loss):
        raise CompressError(f"the loss is {loss} at step {step} of the distillation", "use a smaller --rate")
    best = min((entry[1] for entry in course.curve), default=math.inf)
    course.curve.append((step, loss, divergence))
    if loss < best:
        course.best_step = step
    return loss < best


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min(step / warm, (1 + math.cos(math.pi * step / steps)) / 2)


def _batch(rows: Tensor, step: int, lessons: Lessons) -> Tensor:
    """The rows of update `step`: epochs in an order of their own, a function of the seed alone."""
    places = torch.arange((step - 1) * lessons.batch, step * lessons.batch)
    epochs = (places // len(rows)).tolist()
    orders = {epoch: _order(len(rows), lessons.seed, epoch) for epoch in set(epochs)}
    return rows[torch.stack([orders[e][p] for e, p in zip(epochs, (places % len(rows)).tolist(), strict=True)])]


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def zeros(student: PreTrainedModel, lessons: Lessons) -> dict[str, Tensor]:
    """Where weights are zero and are to stay so, by parameter name; layers without such are left out.

    Raises `UsageError` where adapters would fill them.
    """
    least = {True: 0.0, False: math.inf, None: PRUNED}[lessons.keep_zeros]
    masks = {f"{name}.weight": student.get_parameter(f"{name}.weight") == 0 for name in find_linears(student)}
    kept = {name: mask for name, mask in masks.items() if mask.any() and mask.float().mean() >= least}
    if kept and lessons.lora:
        raise UsageError(f"{next(iter(kept))} is pruned: adapters would fill its zeros", "train without --lora")
    return kept


@torch.no_grad()
def _keep_zero(named: dict[str, nn.Parameter], masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        if name in named:
            named[name].masked_fill_(mask, 0)

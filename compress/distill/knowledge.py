"""Knowledge distillation: a whole student is trained to predict what its teacher predicts.

The loss of a token is the cross entropy of the student's prediction under the teacher's (both at temperature `T`, times
`T**2`; Hinton et al. 2015), plus the distances of hidden states and of attention scores of paired layers (XTC, Wu et al.
2022). If the student equals its teacher, the first term is the teacher's entropy and the others are zero.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from ...calibrate.model.architecture import find_linears
from ...errors import CompressError, UsageError
from ...recipes.training import DistillConfig
from ..report.progress import Event, Observer, silent
from .adapters import attach_adapters
from .feature_hooks import attention_scores, block_outputs
from .training_state import TrainingState

PRUNED = 0.1  # share of exact zeros from which on a layer counts as pruned
PATIENCE = 4  # a run ends early if the held-out loss has not fallen for this many checks


@dataclass
class TrainingHistory:
    """The course of a training: held-out figures at every check, `[step, loss, kl]`, and the step whose weights were kept."""

    curve: list[tuple[int, float, float]] = field(default_factory=list)
    best_step: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LossTerms:
    """The parts of the loss, each a mean over tokens: `logits` is a cross entropy, `entropy` that of the teacher."""

    logits: Tensor
    entropy: Tensor
    hidden: Tensor
    attention: Tensor

    def loss(self, config: DistillConfig) -> Tensor:
        """The weighted sum."""
        return self.logits + config.hidden * self.hidden + config.attention * self.attention


def loss_terms(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Tensor,
    pairs: Sequence[tuple[int, int]],
    config: DistillConfig,
) -> LossTerms:
    """The terms on the rows `ids` `[rows, length]`; `pairs` are pairs of a student and a teacher layer."""
    with torch.no_grad():
        theirs = _observed(teacher, ids, [layer for _, layer in pairs], config)
    ours = _observed(student, ids, [layer for layer, _ in pairs], config)
    wanted = (theirs[0].float() / config.temperature).log_softmax(-1)
    given = (ours[0].float() / config.temperature).log_softmax(-1)
    square = config.temperature**2
    zero = given.new_zeros(())
    hidden = [
        ((o.float() - t.float()).square().sum(-1) / t.float().square().sum(-1).clamp(min=1e-12)).mean()
        for o, t in zip(ours[1], theirs[1], strict=True)
    ]
    attention = [(ours[2][s] - theirs[2][t]).float().square().mean() for s, t in pairs if config.attention]
    return LossTerms(
        logits=-(wanted.exp() * given).sum(-1).mean() * square,
        entropy=-(wanted.exp() * wanted).sum(-1).mean() * square,
        hidden=torch.stack(hidden).mean() if hidden else zero,
        attention=torch.stack(attention).mean() if attention else zero,
    )


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Tensor,
    held_out: Tensor,
    pairs: Sequence[tuple[int, int]],
    config: DistillConfig,
    training_state: TrainingState,
    observer: Observer = silent,
) -> TrainingHistory:
    """Train the parameters of `student`, or adapters, on `rows` `[rows, length]`; it ends with its best weights on `held_out`.

    Processes that accelerate has launched share the rows of every update and the held-out rows, and end with equal students.
    The state is saved to `training_state` at every check; a run that finds a saved state resumes from it, bit for bit.

    Raises `CompressError` if the loss is not finite, `UsageError` for adapters on a pruned student and for a batch that the
    processes cannot share evenly.
    """
    accelerator = Accelerator(mixed_precision=config.precision, cpu=student.device.type == "cpu")
    _check_processes(config, accelerator.num_processes)
    masks = pruned_masks(student, config)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    merge = attach_adapters(student, config.lora, config.seed) if config.lora else None
    training = _Training(student, teacher, held_out, pairs, config, training_state, accelerator)
    training.run(rows, masks, observer)
    accelerator.wait_for_everyone()
    training_state.restore_best(training.trained)
    if merge is not None:
        merge()
    return training.history


def _check_processes(config: DistillConfig, processes: int) -> None:
    rows = config.batch // config.accumulate
    if rows % processes:
        raise UsageError(
            f"{processes} processes cannot share {rows} rows evenly", "use a --batch that is a multiple of their number"
        )


class _Training:
    """A student in training, in one of the processes that share its updates and checks."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        held_out: Tensor,
        pairs: Sequence[tuple[int, int]],
        config: DistillConfig,
        state: TrainingState,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.teacher, self.held_out, self.pairs = student, teacher, held_out, pairs
        self.config, self.state, self.accelerator = config, state, accelerator
        self.trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.history = TrainingHistory()
        self.own = slice(accelerator.process_index, None, accelerator.num_processes)  # the rows of this process

    def run(self, rows: Tensor, masks: dict[str, Tensor], observer: Observer) -> None:
        """Train from the saved state on, or from the start; weights that are zero by `masks` stay zero."""
        config = self.config
        optimiser = AdamW(self.trained.values(), lr=config.rate, weight_decay=0.0)
        done = self.state.resume(self.trained, optimiser, self.history)
        if done == 0:
            self._check(0)
        model, optimiser = self.accelerator.prepare(self.student, optimiser)
        every = max(1, math.ceil(config.steps / config.checks))
        for step in range(done + 1, config.steps + 1):
            self._update(step, model, optimiser, rows)
            _keep_zero(self.trained, masks)
            if step % every == 0 or step == config.steps:
                self._check(step)
                if self.accelerator.is_main_process:
                    self.state.save(step, self.trained, optimiser, self.history)
                observer(Event("distill", step, config.steps, figures={"kl": self.history.curve[-1][2]}))
                if step - self.history.best_step >= PATIENCE * every:
                    break

    def _update(self, step: int, model: PreTrainedModel, optimiser: Optimizer, rows: Tensor) -> None:
        """One update by the rows of `step`, in `accumulate` passes."""
        config = self.config
        for group in optimiser.param_groups:
            group["lr"] = config.rate * _schedule(step, config.steps)
        for part in _batch(rows, step, config).to(self.student.device).chunk(config.accumulate):
            with self.accelerator.autocast():
                terms = loss_terms(model, self.teacher, part[self.own], self.pairs, config)
                loss = terms.loss(config) / config.accumulate
            self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    @torch.no_grad()
    def _check(self, step: int) -> None:
        """Record the held-out loss and KL divergence at `step`, the same in all processes; keep the best weights."""
        config, history = self.config, self.history
        sums = torch.zeros(2, dtype=torch.float64)
        for part in self.held_out[self.own].split(config.batch // config.accumulate):
            terms = loss_terms(self.student, self.teacher, part.to(self.student.device), self.pairs, config)
            sums += len(part) * torch.tensor([float(terms.loss(config)), float(terms.logits - terms.entropy)]).double()
        total = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
        assert isinstance(total, Tensor)
        loss, divergence = (total / len(self.held_out)).tolist()
        if not math.isfinite(loss):
            raise CompressError(f"the loss is {loss} at step {step} of the distillation", "use a smaller --rate")
        best = min((entry[1] for entry in history.curve), default=math.inf)
        history.curve.append((step, loss, divergence))
        if loss < best:
            history.best_step = step
            if self.accelerator.is_main_process:
                self.state.keep_best(self.trained)


def _observed(
    model: PreTrainedModel, ids: Tensor, layers: list[int], config: DistillConfig
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, outputs of the blocks `layers`, and the attention scores of all layers if they are compared."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    with block_outputs(inner, layers if config.hidden else []) as outputs:
        if not config.attention:
            return model(input_ids=ids, use_cache=False).logits, outputs, []
        with attention_scores(inner) as scores:
            return model(input_ids=ids, use_cache=False).logits, outputs, scores


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min(step / warm, (1 + math.cos(math.pi * step / steps)) / 2)


def _batch(rows: Tensor, step: int, config: DistillConfig) -> Tensor:
    """The rows of update `step`: each epoch has its own order, which depends only on the seed."""
    places = torch.arange((step - 1) * config.batch, step * config.batch)
    epochs = (places // len(rows)).tolist()
    orders = {epoch: _order(len(rows), config.seed, epoch) for epoch in set(epochs)}
    return rows[torch.stack([orders[e][p] for e, p in zip(epochs, (places % len(rows)).tolist(), strict=True)])]


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def pruned_masks(student: PreTrainedModel, config: DistillConfig) -> dict[str, Tensor]:
    """Masks of the weights that are zero and have to stay zero, by parameter name; only layers that have such weights.

    Raises `UsageError` if adapters would fill them.
    """
    least = {True: 0.0, False: math.inf, None: PRUNED}[config.keep_zeros]
    masks = {f"{name}.weight": student.get_parameter(f"{name}.weight") == 0 for name in find_linears(student)}
    kept = {name: mask for name, mask in masks.items() if mask.any() and mask.float().mean() >= least}
    if kept and config.lora:
        raise UsageError(f"{next(iter(kept))} is pruned: adapters would fill its zeros", "train without --lora")
    return kept


@torch.no_grad()
def _keep_zero(named: dict[str, nn.Parameter], masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        if name in named:
            named[name].masked_fill_(mask, 0)

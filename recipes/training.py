"""The options of distillation."""

from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class DistillConfig:
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

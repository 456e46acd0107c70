"""The options of the training in a distillation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..errors import UsageError
from .fields import Flag, Options

BySet = Flag(by_set=True)


class DistillConfig(Options):
    """How the smaller model is trained.

    AdamW's learning rate rises over the first twentieth of the steps and falls to zero along a half cosine. Creating one
    raises `UsageError` if a value is not possible.
    """

    steps: int = Field(default=500, ge=0, description="Updates at most; 0: no training.")
    batch: int = Field(default=16, ge=1, description="Rows per update.")
    accumulate: Annotated[int, BySet] = Field(
        default=1, ge=1, description="Forward passes that the batch is split into."
    )
    rate: float = Field(default=5e-4, gt=0, description="Highest learning rate.")
    temperature: Annotated[float, BySet] = Field(default=1.0, gt=0, description="Temperature of both predictions.")
    hidden: Annotated[float, BySet] = Field(
        default=0.0,
        ge=0,
        description="Weight of the hidden states' term: mean over layers and tokens of |s - t|^2 / |t|^2.",
    )
    attention: Annotated[float, BySet] = Field(
        default=0.0,
        ge=0,
        description="Weight of the attention scores' term: mean over layers of the mean squared difference.",
    )
    keep_zeros: Annotated[bool | None, BySet] = Field(
        default=None,
        description="Weights of linear layers that are zero at the start stay zero. "
        "Default: in layers in which at least a tenth are (pruned models).",
    )
    lora: int = Field(
        default=0,
        ge=0,
        description="Rank of low-rank adapters that are trained instead of all parameters, and merged at the end; 0: none.",
    )
    checks: int = Field(
        default=10,
        ge=1,
        description="How often, evenly over the steps, the held-out loss is measured and the state is saved.",
    )
    precision: Annotated[Literal["no", "bf16", "fp16"], BySet] = Field(
        default="no", description="Precision of the forward passes; no: that of the weights."
    )
    seed: int = Field(default=0, description="Seed of the choice and order of the training rows.")

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.batch % self.accumulate:
            raise UsageError(
                f"a batch of {self.batch} rows cannot be split into {self.accumulate} equal passes",
                "set accumulate to a divisor of the batch",
            )
        return self

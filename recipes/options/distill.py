"""The options of `distill`: what is removed from the model, and how the rest is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ...errors import UsageError
from ..fields import Flag
from ..training import DistillConfig
from .calibration import DATA, NameValue


class DistillOptions(DistillConfig):
    """How a model is made smaller, and how the result is trained to predict as the model did.

    `layers` stay, or `keep_layers` of them, or all but `drop`; `choice` selects them. Then the MLPs keep `mlp_width` inner
    channels, the attention `kv_heads` key-value heads and the residual stream `hidden_size` channels; the weights that remain
    are fitted again by least squares. If nothing is removed, `model` itself is trained on the predictions of `teacher`.
    """

    keep_layers: int | None = Field(default=None, ge=1, description="How many layers stay.")
    drop: float | None = Field(
        default=None, ge=0, description="How many layers are removed; below 1: a share of the layers."
    )
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, Flag(metavar="0,2,3,5", separated=True)] = Field(
        default=None, description="The layers that stay, counted from 0."
    )
    choice: Literal["greedy", "influence", "angular", "spread", "first", "last"] = Field(
        default="greedy", description="How the layers are selected."
    )
    mlp_width: float | None = Field(
        default=None, description="Inner channels that each MLP keeps; below 1: a share of them."
    )
    kv_heads: int | None = Field(default=None, ge=1, description="Key-value heads that stay, with their queries.")
    hidden_size: float | None = Field(
        default=None, description="Channels of the residual stream that stay; below 1: a share of them."
    )
    teacher: str | None = Field(default=None, description="Model to learn from. Default: MODEL before the reduction.")
    data: str = Field(default="python-stdlib", description=f"Training text: {DATA}.")
    samples: int = Field(default=4096, ge=2, description="Rows of training text.")
    seq_len: int = Field(default=512, ge=2, description="Tokens per row; at most the model's context.")
    options: NameValue = Field(
        default_factory=dict,
        exclude=True,
        description="Option of the training, NAME=VALUE (repeatable): --set hidden=1",
    )

    @model_validator(mode="before")
    @classmethod
    def _merge_options(cls, value: Any) -> Any:
        """Let `options`, which may hold any option of the training, set the fields themselves."""
        if not isinstance(value, Mapping):
            return value
        words = {name: each for name, each in value.items() if name != "options"}
        if isinstance(words.get("teacher"), Path):
            words["teacher"] = str(words["teacher"])
        for name, each in (value.get("options") or {}).items():
            if name not in DistillConfig.model_fields:
                known = ", ".join(DistillConfig.model_fields)
                raise UsageError(f"the training has no option {name!r}", f"options of the training: {known}")
            if words.get(name, each) != each:
                raise UsageError(f"{name} is set to {words[name]!r} and to {each!r}", "give it once")
            words[name] = each
        return words

    @model_validator(mode="after")
    def _check_reduction(self) -> Self:
        if sum(asked is not None for asked in (self.layers, self.keep_layers, self.drop)) > 1:
            raise UsageError("--layers, --keep-layers and --drop are mutually exclusive", "give one of them")
        if self.drop is not None and self.drop >= 1 and self.drop % 1:
            raise UsageError(f"--drop must be a whole number of layers or a share below 1, got {self.drop:g}")
        return self

    def training(self) -> dict[str, Any]:
        """The options of the training alone, for JSON."""
        return self.model_dump(mode="json", include=set(DistillConfig.model_fields))

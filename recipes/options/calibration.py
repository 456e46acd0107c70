"""The options that `quantize` and `prune` share."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from ..fields import Flag, Options
from ..schema import Calibration

NameValue = Annotated[dict[str, Any], Flag(names=("--set",), metavar="NAME=VALUE")]
DATA = "a .txt, .jsonl or .parquet file, python-stdlib, or a Hugging Face Hub data set"


class CalibrationOptions(Options):
    """What the statistics are collected on, and what is left out."""

    calib: str = Field(default="python-stdlib", description=f"Calibration text: {DATA}.")
    samples: int = Field(default=128, ge=1, description="Calibration rows.")
    seq_len: int = Field(default=2048, ge=2, description="Tokens per row.")
    keep: tuple[str, ...] = Field(default=(), description="Pattern of layers that stay dense (repeatable).")
    options: NameValue = Field(
        default_factory=dict,
        description="Option of the method, NAME=VALUE (repeatable): --set observer=mse",
    )
    seed: int = Field(default=0, description="Seed of the choice of calibration rows.")

    def recipe_parts(self) -> dict[str, Any]:
        """The part of a recipe that these options make."""
        calibration = Calibration(data=self.calib, samples=self.samples, seq_len=self.seq_len)
        return {"calibration": calibration.model_dump(), "keep": list(self.keep), "seed": self.seed}


def split(options: Mapping[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options called `names`, and the others."""
    chosen = {name: value for name, value in options.items() if name in names}
    return chosen, {name: value for name, value in options.items() if name not in chosen}

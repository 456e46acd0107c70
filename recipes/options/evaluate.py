"""The options of `eval` and `bench`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..fields import Flag, Options


class EvaluateOptions(Options):
    """How a model is evaluated, and how it is loaded.

    `device`, `dtype` and `kernel` (for `model` alone) are used to load paths: a model in memory stays as it is.
    """

    seq_len: int | None = Field(default=None, ge=2, description="Tokens per row. Default: the context, at most 2048.")
    stride: int | None = Field(
        default=None, ge=1, description="Tokens between the starts of rows. Default: the row length."
    )
    rows: int | None = Field(default=None, ge=1, description="First rows only.")
    split: Literal["calibration", "training", "heldout"] = Field(
        default="heldout", description="Part of the data that is read, if it has several."
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        default="float32", description="Data type that the weights are loaded in."
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="Rows per forward pass. Default: as many as make 4096 tokens."
    )
    kernel: str | None = Field(default=None, description="Force a kernel on packed layers by its name.")
    kv_bits: int | None = Field(
        default=None,
        description="Pack the keys and values of past tokens: 2 to 8; 16: never. Default: as in the checkpoint.",
    )
    kv_window: int | None = Field(default=None, ge=0, description="Latest tokens that are not packed. Default: 64")
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1, ...")


class BenchOptions(Options):
    """Which products of which kernels are timed."""

    shapes: Annotated[tuple[str, ...], Flag(separated=True)] = Field(
        default=("4096x4096", "11008x4096"), description="Weights to multiply by, OUTxIN."
    )
    rows: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Flag(separated=True)] = Field(
        default=(1, 8, 64, 512), description="Numbers of input rows."
    )
    rounds: int = Field(default=15, ge=1, description="Times that each product is computed; the median is reported.")
    only: str = Field(default="", description="Regular expression: the products to time.")
    plot: Path | None = Field(default=None, description="Draw the ratios into a file: .svg, .png, .pdf.")
    tune: bool = Field(default=False, description="Search the fastest tiles on this GPU first, and keep them.")
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1, ...")

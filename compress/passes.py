"""The one plug-in point: a method is one file that defines a config dataclass and `apply(config, block)`.

The config's fields are the method's options (`--set name=value`, YAML keys, keyword arguments). `apply` reads the weights
and statistics of `block.linears` and leaves a compressed tensor and its figures in each.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibrate.drift import Drift
from ..calibrate.gather import HeldOut
from ..calibrate.hessian import Hessian
from ..calibrate.runner import BlockIO, Call
from .errors import UsageError
from .prune.args import Pruning
from .scheme import PruneArgs, QuantArgs, Scheme, WeightArgs
from .tensor import Compressed

# Method name -> (module below `compress`, config class). The module also holds `apply`.
METHODS: dict[str, tuple[str, str]] = {
    "rtn": ("quantize.rtn", "RTN"),
    "gptq": ("quantize.gptq", "GPTQ"),
    "awq": ("transform.awq", "AWQ"),
    "smoothquant": ("transform.smoothquant", "SmoothQuant"),
    "rotate": ("transform.rotate", "Rotate"),
    "zeroquant": ("quantize.zeroquant", "ZeroQuant"),
    "lkd": ("distill.lkd", "LKD"),
    "tune": ("distill.tune", "Tune"),
    "lorc": ("quantize.lorc", "LoRC"),
    "nf4": ("quantize.nf4", "NF4"),
    "llm-int8": ("quantize.llm_int8", "LLMInt8"),
    "obq": ("quantize.obq", "OBQ"),
    "spqr": ("quantize.spqr", "SpQR"),
    "magnitude": ("prune.magnitude", "Magnitude"),
    "wanda": ("prune.wanda", "Wanda"),
    "sparsegpt": ("prune.sparsegpt", "SparseGPT"),
    "exactobs": ("prune.exactobs", "ExactOBS"),
    "obd": ("prune.obd", "OBD"),
    "obs": ("prune.obs", "OBS"),
}

QUALITIES = ("fast", "balanced", "best")


class PassConfig(Protocol):
    """What the pipeline reads from a method's frozen config dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def needs(
        self,
    ) -> frozenset[
        str
    ]: ...  # what to prepare: any of {"hessian", "held", "drift", "original", "samples", "trial", "block_io"}

    @property
    def scheme(self) -> Scheme | Pruning | None: ...  # None: the pass improves on what the pass before it has left

    @property
    def true_sequential(self) -> bool: ...  # statistics of a linear only after those before it are compressed


@dataclass
class Linear:
    """One linear layer while it is being compressed. `weight` is float32 `[out, in]` whatever the module's layout.

    It is the module's own, and with it becomes what a pass has made of it, unless a pass needs the `original`.
    """

    name: str
    weight: Tensor
    args: WeightArgs  # resolved for this layer
    hessian: Hessian | None = None
    drift: Drift | None = None
    held: HeldOut | None = None  # of the tokens that were held out, which `hessian` and `drift` count too
    result: Compressed | None = None
    figures: dict[str, float | int | str] = field(default_factory=dict)
    inputs: QuantArgs | None = None  # of the activations that it reads

    @property
    def grid_args(self) -> QuantArgs:
        """`args` of a layer that is to be quantized. Raises `UsageError` for one that is to be pruned."""
        if isinstance(self.args, QuantArgs):
            return self.args
        raise UsageError(f"{self.name} is to be pruned, not quantized", "the last pass of a recipe decides")

    @property
    def prune_args(self) -> PruneArgs:
        """`args` of a layer that is to be pruned. Raises `UsageError` for one that is to be quantized."""
        if isinstance(self.args, PruneArgs):
            return self.args
        raise UsageError(f"{self.name} is to be quantized, not pruned", "the last pass of a recipe decides")


@dataclass(frozen=True)
class Surroundings:
    """What a transform of a block works with.

    samples    gives the calibration batches anew: how the block is called, hidden states `[rows, length, width]`, token mask
    trial      a call of the block on tiny random rows, and hidden states for it
    dtypes     in what dtype the checkpoint stores a tensor of the block, by its name inside the block
    head_size  width of an attention head
    """

    samples: Callable[[], Iterator[tuple[Call, Tensor, Tensor | None]]]
    trial: tuple[Call, Tensor]
    dtypes: Mapping[str, torch.dtype]
    head_size: int


@dataclass
class Block:
    """One decoder block: its module (weights in place), the linears of this stage, and its inputs where they were asked for."""

    name: str
    module: nn.Module
    linears: list[Linear]
    around: Surroundings | None = None
    io: BlockIO | None = None
    seed: int = 0  # the recipe's: of whatever a pass chooses at random

    def local(self) -> dict[str, Linear]:
        """The linears by their names inside the block."""
        return {linear.name.removeprefix(f"{self.name}."): linear for linear in self.linears}


@dataclass(frozen=True)
class Method:
    """A registered method: its name, the type of its options, and what it does.

    Methods that quantize or prune have a `scheme` among their options. Transforms have none: they rewrite a block's weights
    for the pass behind them; `scheme` here is the one that `--method` alone stands for. `apply_outside` rewrites weights
    outside the blocks, for transforms of the whole model. `adapt` says in a layer's arguments what the pass will add to it.
    """

    name: str
    config: type[Any]
    apply: Callable[[Any, Block], None]
    scheme: Scheme
    apply_outside: Callable[[Any, PreTrainedModel, Tensor], tuple[Tensor, set[str]]] | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adapt: Callable[[Any, QuantArgs, tuple[int, int]], QuantArgs] | None = None

    def options(self) -> list[str]:
        """The names of the method's options."""
        return [f.name for f in fields(self.config)]

    @property
    def compresses(self) -> bool:
        """Whether the method leaves compressed weights: transforms have no scheme, passes that go on have none of their own."""
        return hasattr(self.config, "scheme")

    def preset(self, quality: str) -> Mapping[str, Any]:
        """The options that a quality stands for: none where the method has only one. Raises `UsageError`."""
        if quality not in QUALITIES:
            raise UsageError(f"unknown quality {quality!r}", f"use one of: {', '.join(QUALITIES)}")
        return self.presets.get(quality, {})


def method(name: str) -> Method:
    """The method called `name`. Raises `UsageError` with the close matches where there is none."""
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"methods: {', '.join(METHODS)}"
        raise UsageError(f"unknown method {name!r}", hint)
    path, config = METHODS[name]
    module = import_module(f".{path}", __package__)
    return Method(
        name,
        getattr(module, config),
        module.apply,
        getattr(module, "SCHEME", Scheme()),
        getattr(module, "apply_outside", None),
        getattr(module, "PRESETS", {}),
        getattr(module, "adapt", None),
    )

"""The one plug-in point: a method is one file that defines a config dataclass and `apply(config, block)`.

The config's fields are the method's options (`--set name=value`, YAML keys, keyword arguments). `apply` reads the weights
and statistics of `block.linears` and leaves a `CompressedTensor` or `PrunedTensor` and its figures in each.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..calibrate.drift import Drift
from ..calibrate.hessian import Hessian
from ..calibrate.runner import BlockIO
from .errors import UsageError
from .scheme import Pruning, Scheme, WeightArgs
from .tensor import CompressedTensor, PrunedTensor

# Method name -> (module below `compress`, config class). The module also holds `apply`.
METHODS: dict[str, tuple[str, str]] = {
    "rtn": ("quantize.rtn", "RTN"),
    "gptq": ("quantize.gptq", "GPTQ"),
    "zeroquant": ("quantize.zeroquant", "ZeroQuant"),
    "lkd": ("distill.lkd", "LKD"),
    "tune": ("distill.tune", "Tune"),
    "obq": ("quantize.obq", "OBQ"),
    "magnitude": ("prune.magnitude", "Magnitude"),
    "wanda": ("prune.wanda", "Wanda"),
    "sparsegpt": ("prune.sparsegpt", "SparseGPT"),
    "exactobs": ("prune.exactobs", "ExactOBS"),
    "obd": ("prune.obd", "OBD"),
    "obs": ("prune.obs", "OBS"),
}


class PassConfig(Protocol):
    """What the pipeline reads from a method's frozen config dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def needs(self) -> frozenset[str]: ...  # statistics to gather first: any of {"hessian", "drift", "block_io"}

    @property
    def scheme(self) -> Scheme | Pruning | None: ...  # None: the pass improves on what the pass before it has left

    @property
    def true_sequential(self) -> bool: ...  # statistics of a linear only after those before it are compressed


@dataclass
class Linear:
    """One linear layer while it is being compressed. `weight` is float32 `[out, in]` whatever the module's layout."""

    name: str
    weight: Tensor
    args: WeightArgs  # resolved for this layer
    hessian: Hessian | None = None
    drift: Drift | None = None
    result: CompressedTensor | PrunedTensor | None = None
    figures: dict[str, float | int | str] = field(default_factory=dict)


@dataclass
class Block:
    """One decoder block: its module (weights in place), the linears of this stage, and its inputs where they were asked for."""

    name: str
    module: nn.Module
    linears: list[Linear]
    io: BlockIO | None = None

    def local(self) -> dict[str, Linear]:
        """The linears by their names inside the block."""
        return {linear.name.removeprefix(f"{self.name}."): linear for linear in self.linears}


@dataclass(frozen=True)
class Method:
    """A registered method: its name, the type of its options, and what it does."""

    name: str
    config: type[Any]
    apply: Callable[[Any, Block], None]

    def options(self) -> list[str]:
        """The names of the method's options."""
        return [f.name for f in fields(self.config)]


def method(name: str) -> Method:
    """The method called `name`. Raises `UsageError` with the close matches where there is none."""
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"methods: {', '.join(METHODS)}"
        raise UsageError(f"unknown method {name!r}", hint)
    path, config = METHODS[name]
    module = import_module(f".{path}", __package__)
    return Method(name, getattr(module, config), module.apply)

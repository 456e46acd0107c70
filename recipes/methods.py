"""The registry of methods: which module and config class stand behind a name."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import UsageError
from .scheme import QuantArgs, Scheme
from .scheme.prune_args import Pruning

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Method name -> (module below `compress.methods`, config class). The module also holds `apply`.
METHODS: dict[str, tuple[str, str]] = {
    "rtn": ("quantize.rtn", "RTN"),
    "gptq": ("quantize.gptq", "GPTQ"),
    "awq": ("transform.awq", "AWQ"),
    "smoothquant": ("transform.smoothquant", "SmoothQuant"),
    "rotate": ("transform.rotate", "Rotate"),
    "zeroquant": ("quantize.zeroquant", "ZeroQuant"),
    "lkd": ("reconstruct.lkd", "LKD"),
    "tune": ("reconstruct.tune", "Tune"),
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


@dataclass(frozen=True)
class Method:
    """A registered method: its name, the type of its options, and what it does.

    Methods that quantize or prune have a `scheme` among their options. Transforms have none: they rewrite a block's weights
    for the pass behind them; `scheme` here is the one that `--method` alone stands for. `apply_outside` rewrites weights
    outside the blocks, for transforms of the whole model. `adapt` says in a layer's arguments what the pass will add to it.
    """

    name: str
    config: type[Any]
    apply: Callable[[Any, Any], None]  # config, block
    scheme: Scheme
    apply_outside: "Callable[[Any, PreTrainedModel, Tensor], tuple[Tensor, set[str]]] | None" = None
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
    module = import_module(f"..compress.methods.{path}", __package__)
    return Method(
        name,
        getattr(module, config),
        module.apply,
        getattr(module, "SCHEME", Scheme()),
        getattr(module, "apply_outside", None),
        getattr(module, "PRESETS", {}),
        getattr(module, "adapt", None),
    )

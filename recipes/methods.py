"""The registry of methods: what stands behind a name.

A line of `METHODS` is all that the command line and the documentation need, and importing this file is cheap. The rest is the
record `METHOD` at the end of the method's own file, which `method` imports by name.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .scheme import QuantArgs, Scheme
    from .scheme.prune_args import Pruning, Scope


class Family(StrEnum):
    """What a method does. A method's file is in the folder of that name below `compress/methods`."""

    QUANTIZE = "quantize"  # replaces weights by codes of its own scheme
    TRANSFORM = "transform"  # rewrites weights for the pass after it, and compresses nothing
    RECONSTRUCT = "reconstruct"  # improves on the codes of the pass before it
    PRUNE = "prune"  # replaces weights by zeros


@dataclass(frozen=True)
class Entry:
    """A line of the registry.

    module   the method's file below `compress.methods`: family and file name
    purpose  what the method does, in one line: the command line and the documentation list it
    """

    module: str
    purpose: str

    @property
    def family(self) -> Family:
        """The family that the method's folder names."""
        return Family(self.module.partition(".")[0])


METHODS: dict[str, Entry] = {
    "gptq": Entry("quantize.gptq", "rounds column by column; the remaining columns compensate each error"),
    "rtn": Entry("quantize.rtn", "rounds every weight to the nearest point of its grid; no calibration"),
    "obq": Entry(
        "quantize.obq", "rounds weight by weight, the cheapest first; the exact form of GPTQ, for small layers"
    ),
    "spqr": Entry("quantize.spqr", "small groups with quantized scales; the most sensitive weights stay in 16 bits"),
    "zeroquant": Entry("quantize.zeroquant", "rounds on ZeroQuant's grids; no calibration"),
    "nf4": Entry("quantize.nf4", "4-bit codes from the quantiles of a normal distribution (QLoRA); no calibration"),
    "llm-int8": Entry("quantize.llm_int8", "8-bit weights and inputs; the columns of outlier channels stay in 16 bits"),
    "awq": Entry("transform.awq", "scales and clips weights by the activations that they multiply"),
    "smoothquant": Entry("transform.smoothquant", "moves the range of the inputs into the weights, for 8-bit inputs"),
    "rotate": Entry("transform.rotate", "rotates the hidden states, so that no channel is an outlier"),
    "tune": Entry(
        "reconstruct.tune", "trains codes, scales and zeros towards the outputs of the original model's blocks"
    ),
    "lkd": Entry("reconstruct.lkd", "trains the weights of each block to imitate the original block"),
    "lorc": Entry("reconstruct.lorc", "adds a low-rank term that compensates the quantization error"),
    "exactobs": Entry("prune.exactobs", "exact Optimal Brain Surgeon on every output row, with one budget per layer"),
    "sparsegpt": Entry("prune.sparsegpt", "prunes in GPTQ's column sweep, for large layers"),
    "wanda": Entry("prune.wanda", "prunes by weight times input norm, in every output row by itself"),
    "magnitude": Entry("prune.magnitude", "prunes the smallest weights; no calibration"),
    "obd": Entry("prune.obd", "prunes by the diagonal of the Hessian; all weights of a layer compete"),
    "obs": Entry("prune.obs", "Optimal Brain Surgeon inside blocks of columns"),
}

AFTER_TRANSFORM = "rtn"  # compresses what a transform leaves if no other pass was asked for
TRAINED_BY = "tune"  # the pass that the quality `best` appends
QUALITIES = ("fast", "balanced", "best")


@dataclass(frozen=True)
class Needs:
    """What the pipeline prepares before it applies a pass.

    hessian   the Hessian of every linear's inputs
    held      Hessian and drift of calibration batches that are kept apart, too
    drift     how far the inputs have moved from those of the original model
    original  the linears' weights as they were before the first pass that compresses
    samples   the calibration batches that reach the block
    trial     a call of the block on tiny random rows
    block_io  inputs and outputs of the block, of the original model's too
    """

    hessian: bool = False
    held: bool = False
    drift: bool = False
    original: bool = False
    samples: bool = False
    trial: bool = False
    block_io: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(*(getattr(self, each.name) or getattr(other, each.name) for each in fields(self)))

    @property
    def text(self) -> bool:
        """Whether calibration text is read."""
        return replace(self, trial=False) != Needs()


class PassConfig(Protocol):
    """What the pipeline reads from a method's frozen config dataclass. A transform's config has no `scheme`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def needs(self) -> Needs: ...

    @property
    def scheme(self) -> "Scheme | Pruning | None": ...  # None: the pass improves on what the pass before it has left

    @property
    def true_sequential(self) -> bool: ...  # statistics of a linear only after those before it are compressed


@dataclass(frozen=True)
class Method:
    """What the general code has to know of a method. Its file ends with one of these, called `METHOD`.

    config         the frozen dataclass of the options
    apply          applies the method: its config, and the `Block` (compress/block.py) whose linears it compresses
    kinds          the kinds of weights (recipes/scheme/kind_names.py) that it makes, or improves on; None for all kinds
    scheme         what the method's name alone stands for; None for one that improves on what another one has left
    presets        options per quality
    scope          which weights compete if pruning does not say so
    prunes_blocks  whether it prunes patterns `1xc`
    adapt          the weight arguments of a layer as they are stored: config, arguments, shape `(out, in)`
    apply_outside  rewrites the weights outside the blocks, for a transform of the whole model: config, model, token ids;
                   gives the matrix that the hidden states are multiplied by, and the names of the changed parameters
    name, family   those of the registry's line, which `method` fills in
    """

    config: type[Any]
    apply: Callable[[Any, Any], None]
    kinds: frozenset[str] | None = None
    scheme: "Scheme | Pruning | None" = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scope: "Scope" = "layer"
    prunes_blocks: bool = False
    adapt: "Callable[[Any, QuantArgs, tuple[int, int]], QuantArgs] | None" = None
    apply_outside: "Callable[[Any, PreTrainedModel, Tensor], tuple[Tensor, set[str]]] | None" = None
    name: str = ""
    family: Family = Family.QUANTIZE

    def options(self) -> list[str]:
        """The names of the method's options."""
        return [f.name for f in fields(self.config)]

    @property
    def compresses(self) -> bool:
        """Whether the method leaves compressed weights, which a transform does not."""
        return self.family is not Family.TRANSFORM

    @property
    def refines(self) -> bool:
        """Whether the method improves on what the pass before it has left, and has no scheme of its own."""
        return self.family is Family.RECONSTRUCT

    def supports(self, kind: str) -> bool:
        """Whether the method makes weights of a `kind`, or improves on them."""
        return self.kinds is None or kind in self.kinds

    def improves_on(self, before: "Method") -> bool:
        """Whether the method improves on a kind of weights that the method `before` makes."""
        return self.kinds is None or before.kinds is None or bool(self.kinds & before.kinds)

    def preset(self, quality: str) -> Mapping[str, Any]:
        """The options that a quality stands for: none if the method has only one. Raises `UsageError` for an unknown one."""
        if quality not in QUALITIES:
            raise UsageError(f"unknown quality {quality!r}", f"use one of: {', '.join(QUALITIES)}")
        return self.presets.get(quality, {})


def method(name: str) -> Method:
    """The method called `name`. Raises `UsageError` with the close matches if there is none."""
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"methods: {', '.join(METHODS)}"
        raise UsageError(f"unknown method {name!r}", hint)
    entry = METHODS[name]
    record: Method = import_module(f"..compress.methods.{entry.module}", __package__).METHOD
    return replace(record, name=name, family=entry.family)


def method_names(*families: Family) -> list[str]:
    """The names of the methods of `families`, in the registry's order. Imports no method."""
    return [name for name, entry in METHODS.items() if entry.family in families]

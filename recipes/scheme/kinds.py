"""The kinds of compressed weights: what arguments ask for each, and the record that all other code looks up.

A kind is a line of `KINDS` and a file `compress/formats/kinds/<name>.py` whose `KIND` is a `Kind`. Lines hold only the words
that arguments are checked by; the file is imported by its name when the record is first asked for. No other code names a kind:
floors below `compress` call the functions of the record, which they look up here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from .prune_args import PruneArgs

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

FLOAT_SCALES = ("float16", "bfloat16", "float32")
# The types of floors above, which this one must not import.
Args = Any  # `QuantArgs`, or `PruneArgs` for pruned weights
Compressed = Any  # an instance of the kind's `tensor`
Format = Any  # of compress/formats/registry.py, as are readers


@dataclass(frozen=True)
class Words:
    """What arguments may say to ask for a kind, known without its file.

    formulas      its own, each with the forms that exist: symmetric (True), asymmetric (False)
    scale_dtypes  its own names of scales that are quantized themselves, each with the float dtype of their scales
    strategies    its own ways of sharing a scale
    outliers      whether a share of its weights may be kept in 16 bits
    claims        whether arguments ask for the kind; None: whether their formula is one of its own
    """

    formulas: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    scale_dtypes: dict[str, str] = field(default_factory=dict)
    strategies: tuple[str, ...] = ()
    outliers: bool = False
    claims: Callable[[Args], bool] | None = None

    def match(self, args: Args) -> bool:
        """Whether `args` ask for the kind."""
        return args.formula in self.formulas if self.claims is None else self.claims(args)


# The first line that matches is the kind; the plain grid comes last, as its readers take what no other kind wrote.
KINDS: dict[str, Words] = {
    "pruned": Words(claims=lambda args: isinstance(args, PruneArgs)),
    "low_rank": Words(claims=lambda args: args.rank > 0),
    "nf4": Words({"nf4": (True,)}, {"nested": "float32"}, ("flat",)),
    "gguf_blocks": Words({"ggml": (True, False)}, {"super": "float16"}),
    "bilevel": Words(
        scale_dtypes={"bilevel": "float16"}, outliers=True, claims=lambda args: args.scale_dtype == "bilevel"
    ),
    "outlier_columns": Words(outliers=True, claims=lambda args: args.outliers > 0 and args.formula == "signed"),
    "grid": Words(
        {"gptq": (True, False), "signed": (True,), "ds": (True, False), "awq": (False,), "spqr": (False,)},
    ),
}
PLAIN = "grid"  # the kind whose arguments `QuantArgs` itself checks, so that it can be made before any file is imported


@dataclass(frozen=True)
class Written:
    """What a checkpoint holds, for the words of its card: the arguments of its layers, how their inputs are quantized,
    whether tables are packed and whether layers are transformers' `Conv1D`."""

    layers: Sequence[Args]
    inputs: Args | None = None
    tables: bool = False
    conv1d: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of compressed weight: all that other code needs to know of it.

    In memory
        tensor     the class of a weight: it has `args`, `shape`, `to` and `dequantize`
        round      (weight `[out, in]`, args) -> the nearest weight of the kind; raises `UsageError` if it depends on more
        step       what one code is apart from the next, float32, broadcasting over the weight
    On disk
        format     (args, how inputs are quantized or None) -> the format that stores layers of these arguments
        read       (`quantization_config`, specs of the stored tensors) -> the reader of a checkpoint, None for others' ones
    In kernels
        operand    the `Weight` or `PrunedWeight` that kernels are given for a tensor
        spec       (args, input columns) -> the `KernelSpec` of a layer for float inputs; None if no kernel multiplies by it
        module     (tensor, bias, `Serving` or None) -> the module that takes a linear layer's place
        table      (tensor, dtype) -> the module that takes the place of a table; None: tables are not stored so
    In words
        label      of a layer's arguments, in a few words: `int4 symmetric`
        listed     (args, input columns) -> the same for lists of layers: `int4 symmetric, groups of 32`
        tags       of the card
        stored_as  the format, for the card
        loading    how others load a checkpoint, for the card: whole lines
        taxonomy   what stands in docs/taxonomy.md: the page of the kind, or what the row of its `example` adds
        example    gives the arguments of that row
    Arguments
        check         raises `UsageError` for arguments that contradict each other
        check_inputs  the same for arguments and those of the layer's inputs, which may be None
        for_width     (args, input columns) -> the arguments that fit such rows; None: groups that divide them, or whole rows
        for_layer     (args, dtype of the original weight) -> the arguments of a layer
    Quantized inputs
        with_inputs   (tensor, arguments of the inputs, their grid or None) -> the tensor that records them
        rounding      (tensor, reach) -> how the layer's inputs are rounded, None: not at all (see kernels/activations.py)
    Other runtimes
        method    what leaves such weights, for the remedies of refusals
        settings  arguments that such remedies may propose
        whole     whether a runtime that reads the kind reads it with any bits and groups
    """

    tensor: type[Any]
    round: "Callable[[Tensor, Args], Compressed]"
    format: Callable[[Args, Args | None], Format]
    read: Callable[[Any, Any], Any]
    operand: Callable[[Compressed], Any]
    spec: Callable[[Args, int], Any]
    module: "Callable[[Compressed, nn.Parameter | None, Any], nn.Module]"
    label: Callable[[Args], str]
    listed: Callable[[Args, int], str]
    tags: str
    stored_as: Callable[[Written], str]
    loading: Callable[[Written], str]
    taxonomy: str
    method: str
    example: Callable[[], Args] | None = None
    table: "Callable[[Compressed, dtype], nn.Module] | None" = None
    step: "Callable[[Compressed], Tensor]" = lambda tensor: tensor.dequantize().abs().max() / 127
    check: Callable[[Args], None] = lambda args: None
    check_inputs: Callable[[Args, Args | None], None] | None = None
    for_width: Callable[[Args, int], Args] | None = None
    for_layer: "Callable[[Args, dtype], Args]" = lambda args, stored: args
    with_inputs: Callable[[Compressed, Args, Any], Compressed] = lambda tensor, inputs, grid: tensor
    rounding: "Callable[[Compressed, float], Callable[[Tensor], Tensor] | None]" = lambda tensor, reach: None
    settings: Callable[[], Iterator[Args]] = lambda: iter(())
    whole: bool = False


OPTIONAL = ("example", "table", "check_inputs", "for_width")
OF_TENSORS = ("shape", "to", "dequantize")
_RECORDS: dict[str, Kind] = {}


def register(name: str, words: Words, kind: Kind) -> None:
    """Add a kind that is defined elsewhere. Raises `UsageError` for a name that is taken and for a record with a gap."""
    if name in KINDS:
        raise UsageError(f"there is a kind {name!r} already", "give the new one another name")
    taken = sorted(words.formulas.keys() & formulas().keys()) + sorted(words.scale_dtypes.keys() & scales().keys())
    if taken:
        raise UsageError(f"{', '.join(taken)} of the kind {name!r} belongs to another kind", "choose another name")
    gap = next((f.name for f in fields(kind) if f.name not in OPTIONAL and getattr(kind, f.name) in (None, "")), None)
    gap = gap or next((f"tensor.{part}" for part in OF_TENSORS if not hasattr(kind.tensor, part)), None)
    if gap is not None:
        raise UsageError(f"the kind {name!r} has no {gap}", "fill every entry of its record (recipes/scheme/kinds.py)")
    plain = KINDS.pop(PLAIN)
    KINDS.update({name: words, PLAIN: plain})
    _RECORDS[name] = kind


def unregister(name: str) -> None:
    """Take a kind away that `register` has added."""
    del KINDS[name], _RECORDS[name]


def formulas() -> dict[str, tuple[bool, ...]]:
    """Every formula, those of the plain grid first, with the forms that exist: symmetric (True), asymmetric (False)."""
    lines = (KINDS[PLAIN], *KINDS.values())
    return {formula: forms for words in lines for formula, forms in words.formulas.items()}


def scales() -> dict[str, str]:
    """Every name of a scale's dtype, with the float dtype of what is stored."""
    return {name: name for name in FLOAT_SCALES} | {
        n: d for words in KINDS.values() for n, d in words.scale_dtypes.items()
    }


def name_of(args: Args) -> str:
    """The name of the kind that `args` ask for. Raises `UsageError` for an unknown formula."""
    found = next((name for name, words in KINDS.items() if words.match(args)), None)
    if found is None:
        raise UsageError(f"unknown formula {args.formula!r}", f"use one of: {', '.join(formulas())}")
    return found


def check(args: Args) -> None:
    """Raise `UsageError` unless the words of `args` are those of one kind, whose own check they pass."""
    name, forms, known = name_of(args), formulas(), scales()
    if args.formula not in forms:
        raise UsageError(f"unknown formula {args.formula!r}", f"use one of: {', '.join(forms)}")
    if args.symmetric not in forms[args.formula]:
        form = "symmetric" if args.symmetric else "asymmetric"
        others = ", ".join(formula for formula, has in forms.items() if args.symmetric in has)
        raise UsageError(f"the {args.formula!r} grid has no {form} form", f"use one of: {others}")
    if args.scale_dtype not in known:
        raise UsageError(f"unknown scale_dtype {args.scale_dtype!r}", f"use one of: {', '.join(known)}")
    for other, words in KINDS.items():
        of = next((word for word in ("scale_dtype", "strategy") if getattr(args, word) in _own(words, word)), None)
        if of is not None and other != name:
            wanted = " or ".join(map(repr, words.formulas)) or repr(other)
            raise UsageError(
                f"{of} {getattr(args, of)!r} needs {other} weights, not the {args.formula!r} grid",
                f"use formula {wanted}, or another {of}",
            )
    if args.outliers and not KINDS[name].outliers:
        raise UsageError(f"{name} weights have no outliers in 16 bits", "use --method spqr or llm-int8")
    if name != PLAIN:
        record(name).check(args)


def _own(words: Words, field_name: str) -> Sequence[str]:
    return tuple(words.scale_dtypes) if field_name == "scale_dtype" else words.strategies


def record(name: str) -> Kind:
    """The record of the kind called `name`."""
    if name not in _RECORDS:
        _RECORDS[name] = import_module(f"...compress.formats.kinds.{name}", __package__).KIND
    return _RECORDS[name]


def kind_of(args: Args) -> Kind:
    """The record of the kind that `args` ask for."""
    return record(name_of(args))


def kind_of_tensor(tensor: Compressed) -> Kind:
    """The record of the kind that a weight in memory is of."""
    found = next((kind for kind in all_kinds() if type(tensor) is kind.tensor), None)
    if found is None:
        raise TypeError(f"no registered kind has the tensor class {type(tensor).__name__}")
    return found


def all_kinds() -> Iterator[Kind]:
    """The records of all kinds, in the order of `KINDS`."""
    return (record(name) for name in list(KINDS))

"""What each runtime accepts, as data, so that a recipe is refused before any work, not by the runtime afterwards.

The limits were found by loading checkpoints; those of vLLM (0.33.0) and SGLang (0.5.23) by reading their loaders, which need a
GPU.
"""

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..recipes.scheme import CacheScheme, PruneArgs, QuantArgs, kinds
from .formats.pack_quantized import EXPERT
from .plan import LayerPlan

ROW = -1  # the group size of one scale per output row

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class RuntimeFormat:
    """One format as one runtime reads it.

    format       what `compress export --format` calls it
    bits         bits per weight
    symmetric    whether symmetric and asymmetric grids are read
    groups       group sizes, ROW among them; None for any
    multiple     what both widths of a layer must be multiples of
    block        what the group size must be a multiple of (one scale per row: the input width)
    fused        projections that the runtime joins must have the same scheme
    uniform      all layers must have the same scheme
    conv1d       `Conv1D` layers are served
    kinds        kinds of weights that are read (`QuantArgs.kind`); None for any
    embeddings   packed embeddings are read
    experts      the experts of a mixture are read
    mixed        experts may have different schemes
    inputs       how inputs are quantized, in the words of `input_words`; empty if they are not
    cache        bits of a packed cache whose scales are read: one scale for all keys of a layer and one for its values,
                 symmetric and calibrated (`CacheScheme.is_shared`); None for any cache, empty for none
    """

    format: str
    bits: tuple[int, ...]
    symmetric: tuple[bool, ...] = (True, False)
    groups: tuple[int, ...] | None = None
    multiple: int = 1
    block: int = 1
    fused: bool = False
    uniform: bool = False
    conv1d: bool = False
    kinds: tuple[str, ...] | None = ("grid",)
    embeddings: bool = False
    experts: bool = False
    mixed: bool = False
    inputs: tuple[str, ...] = ()
    cache: tuple[int, ...] | None = ()


STATIC, PER_TOKEN, DYNAMIC = "static tensor", "dynamic token", "dynamic tensor"
BITS = tuple(range(2, 9))
PACKED = RuntimeFormat("pack-quantized", bits=(2, 4, 8), symmetric=(True,), experts=True, cache=BITS)
GPTQ = RuntimeFormat("gptq", bits=(2, 3, 4, 8), groups=(32, 64, 128), multiple=32, uniform=True)
AWQ = RuntimeFormat("awq", bits=(4,), groups=(32, 64, 128), multiple=32, uniform=True)
GGUF = RuntimeFormat(
    "gguf", bits=(2, 3, 4, 5, 6, 7, 8), symmetric=(True,), block=32, kinds=("grid", "gguf_blocks"), embeddings=True
)
NF4 = RuntimeFormat("bitsandbytes", bits=(4,), conv1d=True, kinds=("nf4",))
INT8_ROWS = RuntimeFormat("bitsandbytes", bits=(8,), symmetric=(True,), groups=(ROW,))
W8A8 = RuntimeFormat(
    "int-quantized", bits=(8,), symmetric=(True,), groups=(ROW,), inputs=(STATIC, PER_TOKEN), cache=BITS
)
PACKED_INPUTS = replace(PACKED, experts=False, inputs=(STATIC, PER_TOKEN))
ONNX = RuntimeFormat("onnx", bits=(4, 8), groups=(16, 32, 64, 128, 256), embeddings=True)
OURS = RuntimeFormat(
    "pack-quantized",
    bits=BITS,
    conv1d=True,
    kinds=None,
    embeddings=True,
    experts=True,
    mixed=True,
    cache=None,
)
MARLIN = (32, 64, 128)  # groups that the kernels of vLLM and SGLang have
TARGETS: dict[str, tuple[RuntimeFormat, ...]] = {
    "lmpress": (OURS, replace(OURS, format="int-quantized", inputs=(STATIC, PER_TOKEN, DYNAMIC))),
    "transformers": (PACKED, NF4, W8A8, PACKED_INPUTS),
    "bitsandbytes": (NF4, INT8_ROWS),
    "gptqmodel": (GPTQ, AWQ),
    "vllm": (
        replace(PACKED, bits=(4, 8), groups=(*MARLIN, ROW), multiple=32, fused=True, cache=(8,)),
        RuntimeFormat("gptq", bits=(4, 8), symmetric=(True,), groups=MARLIN, multiple=32, uniform=True, fused=True),
        RuntimeFormat("awq", bits=(4,), groups=MARLIN, multiple=32, uniform=True, fused=True),
        replace(W8A8, fused=True, cache=(8,)),
    ),
    "sglang": (
        RuntimeFormat("pack-quantized", bits=(4, 8), groups=(*MARLIN, ROW), multiple=128, fused=True, experts=True),
        RuntimeFormat("gptq", bits=(4, 8), symmetric=(True,), groups=MARLIN, multiple=128, uniform=True, fused=True),
        RuntimeFormat("awq", bits=(4,), groups=MARLIN, multiple=128, uniform=True, fused=True),
        replace(W8A8, fused=True, cache=()),
    ),
    "llamacpp": (GGUF,),
    "gguf-transformers": (GGUF,),
    "onnxruntime": (ONNX,),
    "openvino": (replace(ONNX, format="openvino"), ONNX),
    "mlx": (replace(AWQ, symmetric=(True,)),),
}


@dataclass(frozen=True)
class Incompatibility:
    """Why a runtime cannot serve a layer as planned, and the nearest setting that it can serve, as flags."""

    layer: str
    reason: str
    remedy: str


def check(
    layers: Sequence[LayerPlan],
    targets: Iterable[str],
    inputs: QuantArgs | None = None,
    cache: CacheScheme | None = None,
) -> None:
    """Raise `UsageError` if a target has no format that holds all `layers` exactly as planned, inputs quantized by `inputs`
    and the cache packed by `cache`.

    The error names the target, the closest format, the layers at fault, and the nearest setting that serves all targets.
    """
    asked = {target: _containers(target) for target in targets}
    for target, containers in asked.items():
        found = {container: list(faults(layers, container, inputs)) for container in containers}
        _check_cache(target, [each for each in containers if not found[each]], cache)
        closest = min(found, key=lambda container: len({(fault.layer, fault.reason) for fault in found[container]}))
        if found[closest]:
            first = found[closest][0]
            alike = list(dict.fromkeys(fault.layer for fault in found[closest] if fault.reason == first.reason))
            more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
            remedy = nearest(layers, list(asked.values()), inputs) or first.remedy
            raise UsageError(f"{target} cannot serve {first.layer}{more} as {closest.format}: {first.reason}", remedy)


def _check_cache(target: str, serving: Sequence[RuntimeFormat], cache: CacheScheme | None) -> None:
    """Raise `UsageError` if none of the formats that serve the layers carries the cache."""
    if cache is None or not serving or any(_carries(each, cache) for each in serving):
        return
    bits = [bits for each in serving for bits in each.cache or ()]
    if not bits:
        raise UsageError(f"{target} cannot read the scales of a packed cache in {serving[0].format}", "leave `kv` out")
    shared = f"a symmetric, static scale per tensor in {' or '.join(map(str, sorted(set(bits))))} bits"
    raise UsageError(f"{target} reads a packed cache with {shared} only, not {cache}", "see the recipe gptq-w4-kv8")


def _carries(container: RuntimeFormat, cache: CacheScheme) -> bool:
    return container.cache is None or (cache.is_shared and cache.keys.bits in container.cache)


def input_words(inputs: QuantArgs) -> str:
    """How inputs are quantized: `dynamic token`, `static tensor`, `dynamic tensor`."""
    return f"{'dynamic' if inputs.dynamic else 'static'} {inputs.strategy}"


def _containers(target: str) -> tuple[RuntimeFormat, ...]:
    if target not in TARGETS:
        close = difflib.get_close_matches(target, TARGETS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"targets: {', '.join(TARGETS)}"
        raise UsageError(f"unknown target {target!r}", hint)
    return TARGETS[target]


def faults(
    layers: Sequence[LayerPlan], container: RuntimeFormat, inputs: QuantArgs | None = None
) -> Iterator[Incompatibility]:
    """Every reason why `container` cannot hold the layers, in the order of the layers."""
    words = input_words(inputs) if inputs else None
    for layer in layers:
        if isinstance(layer.args, QuantArgs):
            if words not in (container.inputs or (None,)):
                reason = f"inputs quantized per {words}" if words else "inputs that are not quantized"
                yield Incompatibility(layer.name, reason, "use --method gptq" if words else "use --method smoothquant")
            yield from _own_faults(layer, layer.args, container)
        elif isinstance(layer.args, PruneArgs) and layer.args.storage != "dense":
            yield Incompatibility(layer.name, "no other runtime reads sparse weights", "use --format dense")
    if container.experts and not container.mixed:
        experts = [layer for layer in layers if EXPERT.match(layer.name)]
        dense = (layer.name for layer in experts if layer.args is None)
        yield from (
            Incompatibility(name, "experts that stay dense among packed layers", "leave out --keep") for name in dense
        )
        yield from _differing(experts, "one setting for all experts")
    if container.uniform:
        yield from _differing([layer for layer in layers if layer.args is not None], "one setting for all layers")
    if container.fused:
        for joined in _joined(layers):
            yield from _differing(joined, "one setting for the projections that it joins")


def _own_faults(layer: LayerPlan, args: QuantArgs, container: RuntimeFormat) -> Iterator[Incompatibility]:
    rows, columns = layer.shape
    if layer.kind == "Conv1D" and not container.conv1d:
        yield Incompatibility(layer.name, "it is a Conv1D", "export to fp16 after quantizing")
    if EXPERT.match(layer.name) and not container.experts:
        yield Incompatibility(layer.name, "it is an expert of a mixture", "export to fp16 after quantizing")
    if layer.kind == "Embedding" and not container.embeddings:
        yield Incompatibility(layer.name, "it is a packed embedding", "leave `embedding` out of the recipe")
    if container.kinds is not None and args.kind not in container.kinds:
        yield Incompatibility(
            layer.name, f"{container.format} cannot hold {args.kind} weights", "export to fp16 after quantizing"
        )
    if kinds.kind_of(args).whole:
        return
    if args.bits not in container.bits:
        nearest = min(container.bits, key=lambda bits: (abs(bits - args.bits), -bits))
        yield Incompatibility(layer.name, f"{args.bits} bits", f"use --bits {nearest}")
    if args.symmetric not in container.symmetric:
        yield Incompatibility(layer.name, "asymmetric weights", "leave --asymmetric out")
    if rows % container.multiple or columns % container.multiple:
        yield Incompatibility(
            layer.name, f"{rows} x {columns} are not multiples of {container.multiple}", f"use --keep '{layer.name}'"
        )
    group = args.group_size or ROW
    width = columns if group == ROW else group
    if width % container.block or (container.groups is not None and group not in container.groups):
        yield Incompatibility(layer.name, f"groups of {width}", _nearest_group(layer.name, columns, width, container))


def _nearest_group(name: str, columns: int, width: int, container: RuntimeFormat) -> str:
    """The group size nearest in ratio that divides the layer and that the container reads."""
    sizes = container.groups or tuple(range(container.block, columns + 1, container.block))
    usable = [size for size in sizes if size != ROW and columns % size == 0 and size % container.block == 0]
    if not usable:
        return f"use --group-size {ROW}" if ROW in sizes else f"use --keep '{name}'"
    return f"use --group-size {min(usable, key=lambda size: (abs(math.log(size / width)), size))}"


def nearest(
    layers: Sequence[LayerPlan], targets: Sequence[Sequence[RuntimeFormat]], inputs: QuantArgs | None = None
) -> str | None:
    """The setting that every target serves and that is nearest to that of most layers, as flags; None if there is none.

    Layers that are kept dense stay dense, all others get the setting; layers whose widths no format supports are kept dense.
    """
    counts = Counter(layer.args for layer in layers if isinstance(layer.args, QuantArgs))
    if not counts or any(isinstance(layer.args, PruneArgs) for layer in layers):
        return None
    asked = counts.most_common(1)[0][0]
    width = max(layer.shape[1] for layer in layers if layer.args == asked)
    for args in sorted(_settings(), key=lambda args: _distance(args, asked, width)):
        given = [
            replace(layer, args=None if layer.args is None else args.for_width(layer.shape[1])) for layer in layers
        ]
        kept = _kept(given, targets)
        if kept is not None and len(kept) < sum(layer.args is not None for layer in given):
            return _words(args, asked, inputs is not None, kept)
    return None


def _settings() -> Iterator[QuantArgs]:
    """The settings that the format of some runtime may hold."""
    for kind in kinds.all_kinds():
        yield from kind.settings()


def _distance(args: QuantArgs, asked: QuantArgs, width: int) -> tuple[float, int]:
    """Bits weigh most, then the kind of grid, its symmetry, and the ratio of group sizes; in a tie, more bits are nearer."""
    ratio = abs(math.log2((args.group_size or width) / (asked.group_size or width)))
    off = 4 * abs(args.bits - asked.bits) + 3 * (args.kind != asked.kind) + 2 * (args.symmetric != asked.symmetric)
    return off + ratio / 4, -args.bits


def _kept(layers: Sequence[LayerPlan], targets: Sequence[Sequence[RuntimeFormat]]) -> list[str] | None:
    """The layers to keep dense so that every target serves the others; None if that does not help."""
    kept: dict[str, None] = {}
    for containers in targets:
        wrong = min(
            (dict.fromkeys(fault.layer for fault in faults(layers, container)) for container in containers), key=len
        )
        kept |= wrong
    rest = [replace(layer, args=None) if layer.name in kept else layer for layer in layers]
    served = all(any(not list(faults(rest, each)) for each in containers) for containers in targets)
    return list(kept) if served else None


def _words(args: QuantArgs, asked: QuantArgs, inputs: bool, kept: Sequence[str]) -> str:
    method, words = kinds.kind_of(args).method, []
    if args.kind != asked.kind or (inputs and args.kind == kinds.PLAIN):
        words += [f"--method {method}"]
    if args.kind == kinds.PLAIN:
        words += [f"--bits {args.bits}"] if args.bits != asked.bits else []
        size, before = args.group_size or ROW, asked.group_size or ROW
        words += [f"--group-size {size}"] if size != before or args.kind != asked.kind else []
        words += ["--asymmetric"] if asked.symmetric and not args.symmetric else []
    leaves = Counter(name.rpartition(".")[2] for name in kept)
    alone = next(iter(kept), "")
    words += [f"--keep '{alone if len(kept) == 1 else f'*.{leaf}'}'" for leaf in leaves]
    left_out = "leave --asymmetric out" if args.symmetric and not asked.symmetric else ""
    return (
        " and ".join(filter(None, [left_out, f"use {' '.join(words)}" if words else ""]))
        or "use the same options for all layers"
    )


def _joined(layers: Sequence[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Layers of one module that runtimes join into one."""
    by_name = {layer.name: layer for layer in layers}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        for names in FUSED:
            if leaf == names[0]:
                yield [by_name[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in by_name]


def _differing(layers: Sequence[LayerPlan], rule: str) -> Iterator[Incompatibility]:
    for layer in layers[1:]:
        if layer.args != layers[0].args:
            remedy = f"quantize {layers[0].name} and {layer.name} in the same way, or keep both dense"
            yield Incompatibility(layer.name, f"it differs from {layers[0].name}, and there is {rule}", remedy)

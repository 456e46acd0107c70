"""What each runtime accepts, as data, so that a recipe is refused before any work rather than by the runtime afterwards.

The limits were found by loading hand-written checkpoints; those of vLLM by reading its loaders (0.33.0), which need a GPU.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..plan import LayerPlan
from ..scheme import Kind, PruneArgs, QuantArgs

ROW = -1  # the group size of one scale per output row
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Container:
    """One format as one runtime reads it.

    format       what `compress export --format` calls it
    bits         bits a weight
    symmetric    whether symmetric and asymmetric grids are read
    groups       group sizes, ROW among them; None for any
    multiple     what both widths of a layer must be multiples of
    block        what the group size must be a multiple of (one scale per row: the input width)
    fused        projections that the runtime joins must have one scheme
    uniform      all layers must have one scheme
    conv1d       `Conv1D` layers are served
    kinds        what weights may be made of (`QuantArgs.kind`)
    tables       packed embeddings are read
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
    kinds: tuple[Kind, ...] = ("grid",)
    tables: bool = False


PACKED = Container("pack-quantized", bits=(2, 4, 8), symmetric=(True,))
GPTQ = Container("gptq", bits=(2, 3, 4, 8), groups=(32, 64, 128), multiple=32, uniform=True)
AWQ = Container("awq", bits=(4,), groups=(32, 64, 128), multiple=32, uniform=True)
GGUF = Container("gguf", bits=(2, 3, 4, 5, 6, 7, 8), symmetric=(True,), block=32, kinds=("grid", "blocks"), tables=True)
NF4 = Container("bitsandbytes", bits=(4,), conv1d=True, kinds=("nf4",))
ONNX = Container("onnx", bits=(4, 8), groups=(16, 32, 64, 128, 256), tables=True)
TARGETS: dict[str, tuple[Container, ...]] = {
    "lmpress": (
        Container(
            "pack-quantized",
            bits=(2, 3, 4, 5, 6, 7, 8),
            conv1d=True,
            kinds=("grid", "two-level", "nf4", "blocks", "columns", "low-rank"),
            tables=True,
        ),
    ),
    "transformers": (PACKED, NF4),
    "gptqmodel": (GPTQ, AWQ),
    "vllm": (
        Container("pack-quantized", bits=(4, 8), symmetric=(True,), groups=(32, 64, 128, ROW), multiple=32, fused=True),
        Container("gptq", bits=(4, 8), symmetric=(True,), groups=(32, 64, 128), multiple=32, uniform=True, fused=True),
        Container("awq", bits=(4,), groups=(32, 64, 128), multiple=32, uniform=True, fused=True),
    ),
    "llamacpp": (GGUF,),
    "gguf-transformers": (GGUF,),
    "onnxruntime": (ONNX,),
    "openvino": (ONNX,),
}


@dataclass(frozen=True)
class Fault:
    """Why a runtime cannot serve a layer as planned, and the nearest setting that it can, in the command line's words."""

    layer: str
    reason: str
    remedy: str


def check(layers: Sequence[LayerPlan], targets: Iterable[str]) -> None:
    """Raise `UsageError` where a target has no format that holds all `layers` exactly as planned.

    It names the target, the format that comes closest, the layers at fault and the nearest valid setting.
    """
    for target in targets:
        found = {container: list(faults(layers, container)) for container in _containers(target)}
        closest = min(found, key=lambda container: len({fault.layer for fault in found[container]}))
        if found[closest]:
            first = found[closest][0]
            alike = list(dict.fromkeys(fault.layer for fault in found[closest] if fault.reason == first.reason))
            more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
            raise UsageError(
                f"{target} cannot serve {first.layer}{more} as {closest.format}: {first.reason}", first.remedy
            )


def _containers(target: str) -> tuple[Container, ...]:
    if target not in TARGETS:
        close = difflib.get_close_matches(target, TARGETS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"targets: {', '.join(TARGETS)}"
        raise UsageError(f"unknown target {target!r}", hint)
    return TARGETS[target]


def faults(layers: Sequence[LayerPlan], container: Container) -> Iterator[Fault]:
    """Every reason why `container` does not hold the layers, in their order."""
    for layer in layers:
        if isinstance(layer.args, QuantArgs):
            yield from _own_faults(layer, layer.args, container)
        elif isinstance(layer.args, PruneArgs) and layer.args.storage != "dense":
            yield Fault(layer.name, "no other runtime reads sparse weights", "use --format dense")
    if container.uniform:
        yield from _differing([layer for layer in layers if layer.args is not None], "one setting for all layers")
    if container.fused:
        for joined in _joined(layers):
            yield from _differing(joined, "one setting for the projections that it joins")


def _own_faults(layer: LayerPlan, args: QuantArgs, container: Container) -> Iterator[Fault]:
    rows, columns = layer.shape
    if layer.kind == "Conv1D" and not container.conv1d:
        yield Fault(layer.name, "it is a Conv1D", "export to fp16 after quantizing")
    if layer.kind == "Embedding" and not container.tables:
        yield Fault(layer.name, "it is a packed embedding", "leave `embedding` out of the recipe")
    if args.kind not in container.kinds:
        yield Fault(layer.name, f"it holds no {args.kind} weights", "export to fp16 after quantizing")
    if args.kind == "blocks":  # whole as they are, or not at all
        return
    if args.bits not in container.bits:
        nearest = min(container.bits, key=lambda bits: (abs(bits - args.bits), -bits))
        yield Fault(layer.name, f"{args.bits} bits", f"use --bits {nearest}")
    if args.symmetric not in container.symmetric:
        yield Fault(layer.name, "asymmetric weights", "leave --asymmetric out")
    if rows % container.multiple or columns % container.multiple:
        yield Fault(
            layer.name, f"{rows} x {columns} are no multiples of {container.multiple}", f"use --keep '{layer.name}'"
        )
    group = args.group_size or ROW
    width = columns if group == ROW else group
    if width % container.block or (container.groups is not None and group not in container.groups):
        yield Fault(layer.name, f"groups of {width}", _nearest_group(layer.name, columns, width, container))


def _nearest_group(name: str, columns: int, width: int, container: Container) -> str:
    """The group size nearest in ratio that divides the layer and that the container reads."""
    sizes = container.groups or tuple(range(container.block, columns + 1, container.block))
    usable = [size for size in sizes if size != ROW and columns % size == 0 and size % container.block == 0]
    if not usable:
        return f"use --group-size {ROW}" if ROW in sizes else f"use --keep '{name}'"
    return f"use --group-size {min(usable, key=lambda size: (abs(math.log(size / width)), size))}"


def _joined(layers: Sequence[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Layers of one module that runtimes join into one."""
    by_name = {layer.name: layer for layer in layers}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        for names in FUSED:
            if leaf == names[0]:
                yield [by_name[f"{parent}.{name}"] for name in names if f"{parent}.{name}" in by_name]


def _differing(layers: Sequence[LayerPlan], rule: str) -> Iterator[Fault]:
    for layer in layers[1:]:
        if layer.args != layers[0].args:
            remedy = f"quantize {layers[0].name} and {layer.name} alike, or keep both dense"
            yield Fault(layer.name, f"it differs from {layers[0].name}, and there is {rule}", remedy)

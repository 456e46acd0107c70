"""What the foreign safetensors formats have in common: a quantized layer becomes a few tensors, the rest is taken over."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....calibrate.model.moe import renamed
from ....calibrate.model.safetensors_io import TensorSpec, streamed
from ....calibrate.model.source import is_finite
from ....errors import CompressError
from ....kernels.tensor import Compressed, CompressedTensor
from ....recipes.scheme import QuantArgs, WeightArgs

Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class LayerFormat:
    """A format that stores layer by layer. Stateless: it may be asked in any order.

    supports  why a weight quantized by these arguments, of shape (out, in), cannot be stored; None if it can
    pack      the tensors of one layer, by their full names
    config    `quantization_config`, from the quantized layers in order and the names of the linear layers left dense;
              None if the result is an ordinary dense checkpoint
    dtype     of all other floating-point tensors; None leaves each as it is
    dense     whether a layer is stored as plain numbers, so that pruned ones and transformers' `Conv1D` are held too
    spec      of the tensors of one layer, from its name, arguments, rows and columns; None: those that packing blanks gives
    kinds     the kinds of weights that may be stored; `supports` is asked about these
    """

    name: str
    supports: Callable[[QuantArgs, tuple[int, int]], str | None]
    pack: Callable[[str, Any], dict[str, Tensor]]
    config: Callable[[Mapping[str, QuantArgs], Sequence[str]], dict[str, Any] | None]
    dtype: torch.dtype | None = None
    dense: bool = False
    spec: Callable[[str, Any, int, int], dict[str, TensorSpec]] | None = None
    kinds: tuple[str, ...] = ("grid", "gguf_blocks")


def uniform(format_name: str, layers: Mapping[str, QuantArgs]) -> QuantArgs:
    """The arguments that all layers share. Raises `CompressError` naming a layer that differs from the first."""
    (first, args), *rest = layers.items()
    for name, other in rest:
        if (other.bits, other.symmetric, other.group_size) != (args.bits, args.symmetric, args.group_size):
            raise CompressError(
                f"{format_name} has one setting for all layers, but {first} has {describe(args)} and {name} "
                f"{describe(other)}",
                "quantize them alike, keep the others dense (--keep), or export to gguf or a dense format",
            )
    return args


def describe(args: QuantArgs) -> str:
    """The grid in a few words."""
    groups = f"groups of {args.group_size}" if args.group_size else "one scale per row"
    return f"{args.bits} bits {'symmetric' if args.symmetric else 'asymmetric'}, {groups}"


def blank(shape: tuple[int, int], args: QuantArgs) -> CompressedTensor:
    """A layer without values: what `pack` makes of it has the shapes and dtypes of the real thing."""
    rows, columns = shape
    groups = columns // args.columns_per_scale(columns)
    return CompressedTensor(
        torch.empty(rows, columns, dtype=torch.uint8, device="meta"),
        torch.empty(rows, groups, dtype=args.torch_scale_dtype, device="meta"),
        None if args.symmetric else torch.empty(rows, groups, dtype=torch.uint8, device="meta"),
        args,
    )


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """What each tensor will be on disk."""
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def write_tensors(
    folder: Path,
    planned: LayerFormat,
    layers: Mapping[str, tuple[tuple[int, int], WeightArgs]],
    layer: Callable[[str], Compressed],
    others: Specs,
    other: Callable[[str], Tensor],
    transposed: Callable[[str], bool],
    called: Mapping[str, str],
) -> None:
    """Write the shards of a checkpoint into `folder`, one layer in memory at a time.

    `layers` are shapes and arguments by name and `layer` reads one; `others` and `other` are the same for the tensors that
    are taken over. `transposed` says which layers the model stores as `[in, out]`, `called` which modules go by another name.
    """

    def parts(name: str, tensor: Compressed) -> dict[str, Tensor]:
        found = planned.pack(name, tensor)
        return {part: t.T.contiguous() for part, t in found.items()} if transposed(name) else found

    specs = {name: _spec(spec, planned.dtype) for name, spec in others.items()}
    for name, (shape, args) in layers.items():
        if planned.dtype is not None and planned.dense:
            size = (shape[1], shape[0]) if transposed(name) else shape
            specs[f"{name}.weight"] = TensorSpec.of(torch.empty(size, dtype=planned.dtype, device="meta"))
        else:
            assert isinstance(args, QuantArgs)
            specs |= (
                specs_of(parts(name, blank(shape, args))) if planned.spec is None else planned.spec(name, args, *shape)
            )
    with streamed(folder, {renamed(name, called): spec for name, spec in specs.items()}) as put:
        for name in layers:
            for tensor_name, tensor in parts(name, layer(name)).items():
                put(renamed(tensor_name, called), tensor)
        for name in others:
            put(renamed(name, called), cast(name, other(name), specs[name].torch_dtype))


def _spec(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    if dtype is None or not spec.torch_dtype.is_floating_point:
        return spec
    return TensorSpec.of(torch.empty(spec.shape, dtype=dtype, device="meta"))


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`. Raises `CompressError` if a value is too large for it."""
    result = tensor.to(dtype)
    if dtype.is_floating_point and dtype != tensor.dtype and not is_finite(result):
        raise CompressError(f"{name} holds values too large for {dtype}", "export to bf16 or fp32 instead")
    return result

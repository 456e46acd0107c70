"""Pruned weights on disk: really smaller, in a layout of our own (no public runtime serves sparse checkpoints any more).

`bitmask`  P.weight_bitmask  uint8 [out, ceil(in / 8)]  bit `j % 8` of byte `j // 8` of a row: column `j` is stored
           P.weight_values   [stored weights]           row after row, in the order of the columns
`2:4`      P.weight_places   uint8 [out, in / 8 rounded up]  two 2-bit columns per group of 4, a nibble, low nibble first
           P.weight_values   [out, in / 2]              the two values of each group
both       P.weight_shape    int64 [2]                  (out, in)
`dense`    P.weight          [out, in]                  zeros and all: what plain transformers loads

A bitmask takes 1 bit per weight and 16 bits per stored value, 2:4 takes 1 and 8 bits per weight: at half sparsity both 9 of 16.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ....calibrate.model.safetensors_io import NAMES, TensorSpec
from ....errors import CompressError
from ....kernels.kernel import KernelSpec
from ....kernels.modules.linear import PrunedLinear, Serving
from ....kernels.packing.bitmask import from_mask, join, split
from ....kernels.tensor import Compressed, PrunedTensor
from ....kernels.tensor.pruned import by_mask
from ....kernels.weight import PrunedWeight
from ....recipes.scheme import PruneArgs, QuantArgs
from ....recipes.scheme.kinds import Kind, Written
from ..indices import DAMAGED
from ..registry import Layout, Reader, Specs

NAME = "lmpress-sparse"
SPARSE = """\
No other runtime reads sparse weights of this layout (`compress/formats/kinds/pruned.py` describes it): transformers refuses it.
"""
DENSE = """\
`AutoModelForCausalLM.from_pretrained(path)` loads it in plain transformers. The zeros are stored: the files are not smaller.
"""


def supports(args: PruneArgs) -> str | None:
    """Every pruned layer can be stored."""
    return None


def spec(name: str, args: PruneArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` will give for a `rows` x `columns` weight."""
    dtype = NAMES[getattr(torch, str(args.dtype))]
    if args.storage == "dense":
        return {f"{name}.weight": TensorSpec(dtype, (columns, rows) if args.transposed else (rows, columns))}
    shape = {f"{name}.weight_shape": TensorSpec("I64", (2,))}
    if args.storage == "2:4":
        return shape | {
            f"{name}.weight_places": TensorSpec("U8", (rows, math.ceil(columns / 8))),
            f"{name}.weight_values": TensorSpec(dtype, (rows, columns // 2)),
        }
    return shape | {
        f"{name}.weight_bitmask": TensorSpec("U8", (rows, math.ceil(columns / 8))),
        f"{name}.weight_values": TensorSpec(dtype, (rows * columns - args.zeros(rows, columns),)),
    }


def pack(name: str, tensor: PrunedTensor) -> dict[str, Tensor]:
    """The tensors of one pruned weight."""
    if tensor.args.storage == "dense":
        return {f"{name}.weight": tensor.values.T.contiguous() if tensor.args.transposed else tensor.values}
    shape = {f"{name}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64)}
    if tensor.args.storage == "2:4":
        rows = len(tensor.kept)
        places = tensor.kept.view(rows, -1, 4).byte().argsort(dim=2, descending=True, stable=True)[..., :2]
        values = tensor.values.view(rows, -1, 4).gather(2, places).flatten(1)
        nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
        return shape | {f"{name}.weight_places": join(nibbles, 4), f"{name}.weight_values": values}
    mask, values = by_mask(tensor)
    return shape | {f"{name}.weight_bitmask": mask, f"{name}.weight_values": values}


def unpack(name: str, tensors: Mapping[str, Tensor], args: PruneArgs) -> PrunedTensor:
    """The inverse of `pack`. Raises `CompressError` if shape, mask or places and values do not belong together."""
    if args.storage == "dense":
        values = tensors[f"{name}.weight"].T if args.transposed else tensors[f"{name}.weight"]
        return PrunedTensor(values, values != 0, args)
    rows, columns = (int(n) for n in tensors[f"{name}.weight_shape"])
    stored, part = tensors[f"{name}.weight_values"], "weight_places" if args.storage == "2:4" else "weight_bitmask"
    marks = tensors[f"{name}.{part}"]
    if tuple(marks.shape) != (rows, math.ceil(columns / 8)):
        raise CompressError(f"{name}.weight_shape is {(rows, columns)}, {part} is {tuple(marks.shape)}", DAMAGED)
    values = stored.new_zeros(rows, columns)
    if args.storage == "2:4":
        nibbles = split(marks, 4, columns // 4).long()
        places = torch.stack([nibbles & 3, nibbles >> 2], dim=2)
        if bool((places[..., 0] == places[..., 1]).any()):
            raise CompressError(f"{name}.weight_places stores a column of a group twice", DAMAGED)
        values.view(rows, -1, 4).scatter_(2, places, stored.view(rows, -1, 2))
        kept = torch.zeros_like(values, dtype=torch.bool).view(rows, -1, 4).scatter_(2, places, True).flatten(1)
        return PrunedTensor(values, kept, args)
    kept = from_mask(marks, columns)
    if int(kept.sum()) != stored.numel():
        raise CompressError(f"{name} marks {int(kept.sum())} weights and stores {stored.numel()}", DAMAGED)
    values[kept] = stored
    return PrunedTensor(values, kept, args)


def quantization_config(pruned: Mapping[str, PruneArgs], ignored: Iterable[str]) -> dict[str, Any] | None:
    """The `quantization_config` of config.json, None if all is dense.

    transformers skips a `quant_method` that it does not know with a warning, and then serves random weights. Under the name
    of compressed-tensors, whose groups are a mapping and not a list, it refuses the checkpoint instead.
    """
    groups: dict[PruneArgs, list[str]] = {}
    for name, args in pruned.items():
        if args.storage != "dense":
            groups.setdefault(args, []).append(name)
    if not groups:
        return None
    described = [{"targets": names, "weights": asdict(args)} for args, names in groups.items()]
    return {"quant_method": "compressed-tensors", "format": NAME, "ignore": sorted(ignored), "config_groups": described}


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of this layout."""
    return config.get("format") == NAME


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, PruneArgs]:
    """The arguments of every sparse layer, by the `quantization_config` of a checkpoint.

    Raises `ValueError` if a group does not name the dtype of its values.
    """
    found = {name: PruneArgs(**group["weights"]) for group in config["config_groups"] for name in group["targets"]}
    for name, args in found.items():
        if args.dtype is None:
            raise ValueError(f"the group of {name} has no dtype")
    return found


def read(config: Mapping[str, Any], stored: Specs) -> Reader | None:
    """The reader of a checkpoint in this layout."""
    return Reader(read_config, spec, unpack) if wrote(config) else None


def pack_again(name: str, old: Compressed, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of `weight` `[out, in]` in the layout of the pruned layer `old`, which says what is stored."""
    assert isinstance(old, PrunedTensor)
    return pack(name, PrunedTensor.of(weight, ~old.kept, old.args))


def round_to_nearest(weight: Tensor, args: PruneArgs) -> PrunedTensor:
    """The smallest magnitudes of the layer are pruned (`--method magnitude` has scopes and patterns)."""
    flat = weight.abs().flatten()
    pruned = torch.zeros_like(flat, dtype=torch.bool)
    pruned[flat.argsort(stable=True)[: args.zeros(*weight.shape)]] = True
    return PrunedTensor.of(weight, pruned.view_as(weight), args)


def kernel_spec(args: PruneArgs, width: int) -> KernelSpec:
    """What layers need of a kernel."""
    return KernelSpec.pruned(getattr(torch, str(args.dtype)))


def module(tensor: PrunedTensor, bias: nn.Parameter | None, serving: Serving | None) -> nn.Module:
    """A layer that keeps a bitmask and the values that are left."""
    return PrunedLinear(tensor, bias, serving)


def label(args: PruneArgs) -> str:
    """`50.0% pruned, float16`"""
    blocks = f" in blocks {args.pattern}" if args.pattern else ""
    amount = args.pattern if args.n_of_m else f"{args.sparsity:.1%}{blocks}"
    return f"{amount} pruned, {args.dtype}"


def listed(args: PruneArgs, width: int) -> str:
    """The storage."""
    return args.storage


def stored_as(written: Written) -> str:
    """The storage."""
    return f"`{written.layers[0].storage}`"


def loading(written: Written) -> str:
    """transformers loads dense zeros."""
    return DENSE if all(args.storage == "dense" for args in written.layers) else SPARSE


def format_of(args: PruneArgs, inputs: QuantArgs | None) -> Layout:
    """One layout for every storage."""
    return FORMAT


FORMAT = Layout(NAME, supports, spec, pack, unpack, quantization_config)
KIND = Kind(
    tensor=PrunedTensor,
    round=round_to_nearest,
    format=format_of,
    read=read,
    operand=PrunedWeight.of,
    spec=kernel_spec,
    module=module,
    label=label,
    listed=listed,
    tags="pruned",
    stored_as=stored_as,
    loading=loading,
    taxonomy="`formats.md` (zeros, in a bitmask or 2:4)",
    method="magnitude",
)

"""compressed-tensors `pack-quantized`: integer weights of 2 to 8 bits, packed into 32-bit words.

P.weight_packed      int32 [out, ceil(in * bits / 32)]     codes, a little-endian bit stream along each row
P.weight_scale       [out, groups] in the scale's dtype
P.weight_zero_point  int32 [ceil(out * bits / 32), groups] zeros, a stream along each column (asymmetric only)
P.weight_shape       int64 [2]                             (out, in)
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...calibrate.model.safetensors_io import NAMES, TensorSpec
from ...kernels.packing.bitstream import pack_rows, unpack_rows
from ...kernels.tensor import CompressedTensor
from ...recipes.scheme import QuantArgs
from .name_pattern import matches

NAME = "pack-quantized"
EXPERT = re.compile(r".*\.experts\.\d+\..*")


def supports(args: QuantArgs) -> str | None:
    """Why the format cannot hold a weight quantized by `args`, or None if it can."""
    if args.strategy not in ("group", "channel", "tensor"):
        return f"{NAME} stores no scales per {args.strategy}"
    if args.formula == "spqr":
        return f"{NAME} stores integer zeros only, the spqr grid has real ones"
    if args.kind != "grid":
        return f"{NAME} stores plain integers, not {args.kind} weights"
    return None


def spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` will give for a `rows` x `columns` weight."""
    groups = columns // args.columns_per_scale(columns)
    tensors = {
        f"{name}.weight_packed": TensorSpec("I32", (rows, words(columns, args.bits))),
        f"{name}.weight_scale": TensorSpec(NAMES[args.torch_scale_dtype], (rows, groups)),
        f"{name}.weight_shape": TensorSpec("I64", (2,)),
    }
    if not args.symmetric:
        tensors[f"{name}.weight_zero_point"] = TensorSpec("I32", (words(rows, args.bits), groups))
    return tensors


def words(count: int, bits: int) -> int:
    """32-bit words that `count` codes take."""
    return math.ceil(count * bits / 32)


def pack(name: str, tensor: CompressedTensor) -> dict[str, Tensor]:
    """The tensors of one quantized weight."""
    bits = tensor.args.bits
    packed = {
        f"{name}.weight_packed": pack_rows(tensor.codes, bits),
        f"{name}.weight_scale": tensor.scale,
        f"{name}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if tensor.zero is not None:
        packed[f"{name}.weight_zero_point"] = pack_rows(tensor.zero.T.contiguous(), bits).T.contiguous()
    return packed


def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> CompressedTensor:
    """The inverse of `pack`."""
    rows, columns = (int(n) for n in tensors[f"{name}.weight_shape"])
    codes = unpack_rows(tensors[f"{name}.weight_packed"], args.bits, columns)
    zero = None
    if not args.symmetric:
        packed = tensors[f"{name}.weight_zero_point"].T.contiguous()
        zero = unpack_rows(packed, args.bits, rows).T.contiguous()
    return CompressedTensor(codes, tensors[f"{name}.weight_scale"], zero, args)


def quantization_config(quantized: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. Layers that differ in their arguments form groups of their own."""
    groups: dict[QuantArgs, list[str]] = {}
    for name, args in quantized.items():
        groups.setdefault(args, []).append(name)
    single = len(groups) == 1
    mixtures = [args for args, names in groups.items() if any(map(EXPERT.match, names))]
    if len(mixtures) == 1:  # transformers finds experts by this pattern
        others = [name for name in groups[mixtures[0]] if not EXPERT.match(name)]
        groups[mixtures[0]] = [f"re:{EXPERT.pattern}", *others]
    return {
        "quant_method": "compressed-tensors",
        "format": NAME,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{i}": group(args, ["Linear"] if single else names) for i, (args, names) in enumerate(groups.items())
        },
    }


def group(args: QuantArgs, targets: list[str]) -> dict[str, Any]:
    """An entry of `config_groups`: layers by their names, or `Linear` for all that have no group of their own."""
    return {
        "targets": targets,
        "weights": {
            "num_bits": args.bits,
            "type": "int",
            "symmetric": args.symmetric,
            # A scale of the whole tensor is stored once per row: the layout has no other place for it.
            "strategy": "group" if args.strategy == "group" else "channel",
            "group_size": args.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": NAME,
    }


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of this layout."""
    return config["quant_method"] == "compressed-tensors"


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every packed layer, by the `quantization_config` of a checkpoint and its `stored` tensors.

    Raises `ValueError` for groups that are not packed integer weights.
    """
    groups = [group for group in config["config_groups"].values() if _is_packed(group, config.get("format"))]
    if not groups:
        raise ValueError(f"no group of its layers is {NAME}")
    found = {}
    for name in [n.removesuffix(".weight_packed") for n in stored if n.endswith(".weight_packed")]:
        weights = weights_of(name, groups)
        if weights is None:
            raise ValueError(f"{name} is not stored as packed integers in contiguous groups")
        found[name] = QuantArgs(
            bits=weights["num_bits"],
            symmetric=weights["symmetric"],
            strategy=weights["strategy"],
            group_size=weights["group_size"],
            scale_dtype=_scale_dtype(stored.get(f"{name}.weight_scale")),
        )
    return found


def weights_of(name: str, groups: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The weights of the group that describes the layer: by its name, by a pattern, or of all linears; None without one.

    Raises `ValueError` for patterns that `name_pattern.py` does not support.
    """

    def by_pattern(target: str) -> bool:
        return target.startswith("re:") and matches(target.removeprefix("re:"), name)

    describes: tuple[Callable[[str], bool], ...] = (name.__eq__, by_pattern, "Linear".__eq__)
    return next((g["weights"] for way in describes for g in groups if any(map(way, g["targets"]))), None)


def _scale_dtype(scale: TensorSpec | None) -> str:
    """The stored dtype of scales; if they are missing, the loader raises an error itself."""
    return str(torch.float16 if scale is None else scale.torch_dtype).removeprefix("torch.")


def _is_packed(group: Mapping[str, Any], default: str | None) -> bool:
    """Whether a group's layers hold packed integers in contiguous groups, and nothing else of theirs is quantized."""
    weights = group["weights"]
    plain = not group.get("input_activations") and not group.get("output_activations")
    contiguous = weights["type"] == "int" and weights.get("actorder") not in ("group", "dynamic")
    return plain and contiguous and (group.get("format") or default) == NAME

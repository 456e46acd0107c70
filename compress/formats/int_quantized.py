"""compressed-tensors `int-quantized`: int8 weights that meet int8 activations (W8A8).

P.weight        int8 [out, in]                     codes - 128: w = scale * code
P.weight_scale  [out, 1] in the scale's dtype      a scale of the whole matrix is repeated
P.input_scale   [1] in the scale's dtype           static activation scales only

Dynamic activation scales are found by whoever serves the checkpoint: lmpress divides the largest magnitude by 127,
compressed-tensors by 127.5.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..scheme import QuantArgs, WeightArgs
from ..tensor import Compressed, CompressedTensor
from . import pack_quantized
from .shards import NAMES, TensorSpec

NAME = "int-quantized"
OFFSET = 128  # of the unsigned codes in memory


@dataclass(frozen=True)
class IntQuantized:
    """The format for layers whose inputs are quantized by `inputs`."""

    inputs: QuantArgs

    def supports(self, args: WeightArgs) -> str | None:
        """Why the format cannot hold a weight compressed by `args`, or None where it can."""
        if not isinstance(args, QuantArgs):
            return f"{NAME} holds no pruned weights"
        if args.bits != 8 or self.inputs.bits != 8:
            return f"{NAME} is W8A8, not W{args.bits}A{self.inputs.bits}"
        if args.strategy not in ("channel", "tensor") or not args.symmetric:
            return f"{NAME} stores symmetric weights with a scale per row"
        return None

    def spec(self, name: str, args: WeightArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The tensors that `pack` will give for a `rows` x `columns` weight."""
        assert isinstance(args, QuantArgs)
        tensors = {
            f"{name}.weight": TensorSpec("I8", (rows, columns)),
            f"{name}.weight_scale": TensorSpec(NAMES[args.torch_scale_dtype], (rows, 1)),
        }
        if not self.inputs.dynamic:
            tensors[f"{name}.input_scale"] = TensorSpec(NAMES[self.inputs.torch_scale_dtype], (1,))
        return tensors

    def pack(self, name: str, tensor: Compressed) -> dict[str, Tensor]:
        """The tensors of one quantized weight and, where it is static, the scale of its inputs."""
        assert isinstance(tensor, CompressedTensor)
        packed = {
            f"{name}.weight": (tensor.codes.to(torch.int16) - OFFSET).to(torch.int8),
            f"{name}.weight_scale": tensor.scale,
        }
        if tensor.input_scale is not None:
            packed[f"{name}.input_scale"] = tensor.input_scale
        return packed

    def unpack(self, name: str, tensors: Mapping[str, Tensor], args: WeightArgs) -> CompressedTensor:
        """The inverse of `pack`."""
        assert isinstance(args, QuantArgs)
        codes = (tensors[f"{name}.weight"].to(torch.int16) + OFFSET).to(torch.uint8)
        scale = tensors[f"{name}.weight_scale"]
        return CompressedTensor(codes, scale, None, args, self.inputs, tensors.get(f"{name}.input_scale"))

    def quantization_config(self, compressed: Mapping[str, WeightArgs], ignored: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        quantized = {name: args for name, args in compressed.items() if isinstance(args, QuantArgs)}
        config: dict[str, Any] = pack_quantized.quantization_config(quantized, ignored) | {"format": NAME}
        for group in config["config_groups"].values():
            group["format"] = NAME
            group["input_activations"] = {
                "num_bits": self.inputs.bits,
                "type": "int",
                "symmetric": True,
                "strategy": self.inputs.strategy,
                "group_size": None,
                "dynamic": self.inputs.dynamic,
            }
        return config


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's `quantization_config` speaks of this format."""
    return config.get("quant_method") == "compressed-tensors" and config.get("format") == NAME


def of_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> IntQuantized:
    """The format as a checkpoint speaks of it. Raises `ValueError` as `read_inputs` does."""
    return IntQuantized(read_inputs(config, stored))


def read_inputs(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> QuantArgs:
    """How the layers' inputs are quantized. Raises `ValueError` for kinds that lmpress does not serve."""
    kinds = [group["input_activations"] for group in config["config_groups"].values()]
    if not kinds[0] or any(kind != kinds[0] for kind in kinds) or config.get("kv_cache_scheme"):
        raise ValueError("its layers' inputs are not all quantized alike, or its cache is quantized too")
    static = next((spec.torch_dtype for name, spec in stored.items() if name.endswith(".input_scale")), torch.float16)
    return _integer_args(kinds[0], static, dynamic=bool(kinds[0]["dynamic"]))


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The weight arguments of every int8 layer among the `stored` tensors. Raises `ValueError` as `read_inputs` does."""
    found = {}
    for name in [
        n.removesuffix(".weight") for n, spec in stored.items() if n.endswith(".weight") and spec.dtype == "I8"
    ]:
        groups = config["config_groups"].values()
        weights = next((g["weights"] for g in groups if {name, "Linear"} & set(g["targets"])), None)
        if weights is None:
            raise ValueError(f"{name} belongs to no group of its layers")
        scale = stored.get(f"{name}.weight_scale")
        found[name] = _integer_args(weights, torch.float16 if scale is None else scale.torch_dtype)
    return found


def _integer_args(kind: Mapping[str, Any], scale_dtype: torch.dtype, dynamic: bool = False) -> QuantArgs:
    if kind["type"] != "int" or not kind["symmetric"]:
        raise ValueError("only symmetric integers are served")
    return QuantArgs(
        bits=kind["num_bits"],
        strategy=kind["strategy"],
        group_size=None,
        formula="signed",
        scale_dtype=str(scale_dtype).removeprefix("torch."),  # type: ignore[arg-type]
        dynamic=dynamic,
    )

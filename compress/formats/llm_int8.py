"""LLM.int8's own format: int8 weights, and the input columns that calibration found loud once more in 16 bits.

P.weight           int8 [out, in]              codes - 128: w = scale * code, of all columns
P.weight_scale     [out, 1] in the scale's dtype
P.weight_columns   [kept]                      their numbers: uint8, uint16 or int32, the narrowest that holds `in`
P.weight_outliers  float16 [out, kept]         their weights
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...calibrate.model.safetensors_io import NAMES, TensorSpec
from ...kernels.tensor import Compressed, MixedTensor
from ...recipes.scheme import QuantArgs, WeightArgs, inputs_per, signed_weights
from .int_quantized import OFFSET
from .spqr import index_dtype

NAME = "llm-int8"


def kept_columns(args: QuantArgs, columns: int) -> int:
    """How many of a layer's input columns are kept in 16 bits: decided by its width alone, so that sizes are known before."""
    return math.ceil(args.outliers * columns - 1e-9)


@dataclass(frozen=True)
class LLMInt8:
    """The format for layers whose inputs are quantized by `inputs`."""

    inputs: QuantArgs

    def supports(self, args: WeightArgs) -> str | None:
        """Why the format cannot hold a weight compressed by `args`, or None where it can."""
        held = isinstance(args, QuantArgs) and args.kind == "columns"
        return None if held else f"{NAME} stores 8 bits with 16-bit columns only"

    def spec(self, name: str, args: WeightArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The tensors that `pack` will give for a `rows` x `columns` weight."""
        assert isinstance(args, QuantArgs)
        kept = kept_columns(args, columns)
        return {
            f"{name}.weight": TensorSpec("I8", (rows, columns)),
            f"{name}.weight_scale": TensorSpec(NAMES[args.torch_scale_dtype], (rows, 1)),
            f"{name}.weight_columns": TensorSpec(NAMES[index_dtype(columns)], (kept,)),
            f"{name}.weight_outliers": TensorSpec("F16", (rows, kept)),
        }

    def pack(self, name: str, tensor: Compressed) -> dict[str, Tensor]:
        """The tensors of one quantized weight."""
        assert isinstance(tensor, MixedTensor)
        return {
            f"{name}.weight": (tensor.codes.to(torch.int16) - OFFSET).to(torch.int8),
            f"{name}.weight_scale": tensor.scale,
            f"{name}.weight_columns": tensor.columns.to(index_dtype(tensor.shape[1])),
            f"{name}.weight_outliers": tensor.outliers,
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor], args: WeightArgs) -> MixedTensor:
        """The inverse of `pack`."""
        assert isinstance(args, QuantArgs)
        return MixedTensor(
            codes=(tensors[f"{name}.weight"].to(torch.int16) + OFFSET).to(torch.uint8),
            scale=tensors[f"{name}.weight_scale"],
            columns=tensors[f"{name}.weight_columns"].to(torch.int64),
            outliers=tensors[f"{name}.weight_outliers"],
            args=args,
            inputs=self.inputs,
        )

    def quantization_config(self, compressed: Mapping[str, WeightArgs], ignored: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Under the name of compressed-tensors with groups in a list, so that transformers refuses it (see `sparse.py`).
        """
        groups = [
            {"targets": [name], "outliers": args.outliers, "scale_dtype": args.scale_dtype}
            for name, args in compressed.items()
            if isinstance(args, QuantArgs)
        ]
        config = {"quant_method": "compressed-tensors", "format": NAME, "threshold": self.inputs.threshold}
        return config | {"ignore": sorted(ignored), "config_groups": groups}


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's `quantization_config` speaks of this format."""
    return config.get("format") == NAME


def of_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> LLMInt8:
    """The format as a checkpoint speaks of it."""
    return LLMInt8(inputs_per("token", dynamic=True, threshold=float(config["threshold"])))


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `quantization_config` of a checkpoint."""
    return {
        name: signed_weights("channel", outliers=group["outliers"], scale_dtype=group["scale_dtype"])
        for group in config["config_groups"]
        for name in group["targets"]
    }

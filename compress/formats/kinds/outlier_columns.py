"""Outlier columns (LLM.int8) in a format of our own: int8 weights, and in 16 bits the input columns with outlier values.

P.weight           int8 [out, in]              codes - 128: w = scale * code, of all columns
P.weight_scale     [out, 1] in the scale's dtype
P.weight_columns   [kept]                      their numbers: uint8, uint16 or int32, the narrowest that holds `in`
P.weight_outliers  float16 [out, kept]         their weights
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....calibrate.model.safetensors_io import NAMES, TensorSpec
from ....errors import UsageError
from ....kernels.activations import decompose
from ....kernels.kernel import KernelSpec
from ....kernels.modules.linear import OutlierColumnsLinear, Serving
from ....kernels.tensor import OutlierColumnsTensor
from ....kernels.weight import Weight
from ....recipes.scheme import QuantArgs, inputs_per, signed_weights
from ....recipes.scheme.kinds import Kind, Written
from ..indices import check_ascending
from ..int_quantized import OFFSET
from ..registry import Reader, Specs
from .bilevel import index_dtype

NAME = "llm-int8"
USE = "use --method llm-int8"
LOADING = """\
No other runtime keeps columns in 16 bits; `compress export --format bitsandbytes` writes the 8-bit part of all columns for
bitsandbytes' own LLM.int8.
"""


def kept_columns(args: QuantArgs, columns: int) -> int:
    """How many of a layer's input columns are kept in 16 bits: its width alone decides, so that sizes are known beforehand."""
    return math.ceil(args.outliers * columns - 1e-9)


@dataclass(frozen=True)
class LLMInt8:
    """The format for layers whose inputs are quantized by `inputs` (None: it holds none)."""

    inputs: QuantArgs | None

    def supports(self, args: QuantArgs) -> str | None:
        """Why the format cannot hold a weight quantized by `args`, or None if it can."""
        held = args.outliers > 0 and self.inputs is not None
        return None if held else f"{NAME} stores 8 bits with 16-bit columns, for quantized inputs only"

    def spec(self, name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The tensors that `pack` will give for a `rows` x `columns` weight."""
        kept = kept_columns(args, columns)
        return {
            f"{name}.weight": TensorSpec("I8", (rows, columns)),
            f"{name}.weight_scale": TensorSpec(NAMES[args.torch_scale_dtype], (rows, 1)),
            f"{name}.weight_columns": TensorSpec(NAMES[index_dtype(columns)], (kept,)),
            f"{name}.weight_outliers": TensorSpec("F16", (rows, kept)),
        }

    def pack(self, name: str, tensor: OutlierColumnsTensor) -> dict[str, Tensor]:
        """The tensors of one quantized weight."""
        return {
            f"{name}.weight": (tensor.codes.to(torch.int16) - OFFSET).to(torch.int8),
            f"{name}.weight_scale": tensor.scale,
            f"{name}.weight_columns": tensor.columns.to(index_dtype(tensor.shape[1])),
            f"{name}.weight_outliers": tensor.outliers,
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> OutlierColumnsTensor:
        """The inverse of `pack`. Raises `CompressError` if the columns do not ascend or lie outside the weight."""
        assert self.inputs is not None
        codes, columns = tensors[f"{name}.weight"], tensors[f"{name}.weight_columns"].to(torch.int64)
        check_ascending(f"{name}.weight_columns", columns, codes.shape[1])
        return OutlierColumnsTensor(
            codes=(codes.to(torch.int16) + OFFSET).to(torch.uint8),
            scale=tensors[f"{name}.weight_scale"],
            columns=columns,
            outliers=tensors[f"{name}.weight_outliers"],
            args=args,
            inputs=self.inputs,
        )

    def quantization_config(self, compressed: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Under the name of compressed-tensors with groups in a list, so that transformers refuses it (see `pruned.py`).
        """
        assert self.inputs is not None
        groups = [
            {"targets": [name], "outliers": args.outliers, "scale_dtype": args.scale_dtype}
            for name, args in compressed.items()
        ]
        config = {"quant_method": "compressed-tensors", "format": NAME, "threshold": self.inputs.threshold}
        return config | {"ignore": sorted(ignored), "config_groups": groups}


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's `quantization_config` is of this format."""
    return config.get("format") == NAME


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `quantization_config` of a checkpoint."""
    return {
        name: signed_weights("channel", outliers=group["outliers"], scale_dtype=group["scale_dtype"])
        for group in config["config_groups"]
        for name in group["targets"]
    }


def read(config: Mapping[str, Any], stored: Specs) -> Reader | None:
    """The reader of a checkpoint in this format."""
    if not wrote(config):
        return None
    layers = LLMInt8(inputs_per("token", dynamic=True, threshold=float(config["threshold"])))
    return Reader(read_config, layers.spec, layers.unpack, inputs=layers.inputs)


def check(args: QuantArgs) -> None:
    """Raise `UsageError` for columns in 16 bits with scales that are not those of rows."""
    if args.strategy != "channel":
        raise UsageError("outliers as columns in 16 bits need one scale per row", USE)


def check_inputs(args: QuantArgs, inputs: QuantArgs | None) -> None:
    """Raise `UsageError` for inputs that columns in 16 bits cannot be taken from."""
    if args.bits != 8 or inputs is None or not inputs.decomposes:
        raise UsageError("columns in 16 bits need weights of 8 bits and inputs of 8 bits per token", USE)


def round_to_nearest(weight: Tensor, args: QuantArgs) -> OutlierColumnsTensor:
    """Raises `UsageError`: which columns need 16 bits depends on the inputs, not on the weight."""
    raise UsageError("columns in 16 bits are chosen by the inputs of a layer, not by rounding", USE)


def operand(tensor: OutlierColumnsTensor) -> Weight:
    """Codes of all columns, the columns in 16 bits, and the threshold of the inputs."""
    apart = (tensor.columns, tensor.outliers, tensor.inputs.threshold)
    return Weight(tensor.codes, tensor.scale, None, tensor.args.bits, tensor.shape[1], None, *apart)


def kernel_spec(args: QuantArgs, width: int) -> KernelSpec:
    """What layers need of a kernel."""
    return KernelSpec(args.bits, width, args.symmetric, parts=("columns",))


def module(tensor: OutlierColumnsTensor, bias: nn.Parameter | None, serving: Serving | None) -> nn.Module:
    """A layer that quantizes its inputs per token."""
    return OutlierColumnsLinear(tensor, bias, serving)


def label(args: QuantArgs) -> str:
    """`int8 symmetric`"""
    return f"int{args.bits} symmetric"


def listed(args: QuantArgs, width: int) -> str:
    """`int8 symmetric, 3 of 128 columns in 16 bits`"""
    return f"{label(args)}, {kept_columns(args, width)} of {width} columns in 16 bits"


def stored_as(written: Written) -> str:
    """A format of our own."""
    return "int8 with 16-bit columns, of lmpress"


def loading(written: Written) -> str:
    """bitsandbytes loads an export of it."""
    return LOADING


def rounding(tensor: OutlierColumnsTensor, reach: float) -> Callable[[Tensor], Tensor] | None:
    """Inputs are rounded per token, except for the columns in 16 bits and those that reach the threshold."""
    return lambda x: decompose(x, tensor.inputs, tensor.columns)


KIND = Kind(
    tensor=OutlierColumnsTensor,
    round=round_to_nearest,
    format=lambda args, inputs: LLMInt8(inputs),
    read=read,
    operand=operand,
    spec=kernel_spec,
    module=module,
    label=label,
    listed=listed,
    tags="quantized, llm-int8",
    stored_as=stored_as,
    loading=loading,
    taxonomy="`methods/llm-int8.md` (columns in 16 bits)",
    method="llm-int8",
    check=check,
    check_inputs=check_inputs,
    rounding=rounding,
)

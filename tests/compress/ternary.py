"""A kind of weight in one file, as FP8 or NVFP4 would be: codes for -1, 0 and 1 with a float16 scale per row.

P.weight_ternary  int32 [out, ceil(in / 16)]  codes of two bits
P.weight_scale    float16 [out, 1]            the mean magnitude of the row's values that are not 0
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmpress.calibrate.model.safetensors_io import TensorSpec
from lmpress.compress.formats.registry import Layout, Reader
from lmpress.kernels.kernel import KernelSpec
from lmpress.kernels.modules.linear import PackedLinear
from lmpress.kernels.packing.bitstream import pack_rows, unpack_rows
from lmpress.kernels.weight import Weight
from lmpress.recipes.scheme import QuantArgs
from lmpress.recipes.scheme.kinds import Kind, Words, register

NAME = "ternary"


@dataclass(frozen=True)
class TernaryTensor:
    """`scale * (codes - 1)`: codes uint8 `[out, in]` below 3, scale float16 `[out, 1]`."""

    codes: Tensor
    scale: Tensor
    args: QuantArgs

    @classmethod
    def of(cls, weight: Tensor, args: QuantArgs) -> "TernaryTensor":
        size = weight.abs().mean(1, keepdim=True)
        signs = weight.sign() * (weight.abs() > size / 2)
        scale = (weight.abs() * signs.abs()).sum(1, keepdim=True) / signs.abs().sum(1, keepdim=True).clamp(min=1)
        return cls((signs + 1).to(torch.uint8), scale.half(), args)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device | str) -> "TernaryTensor":
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.codes.to(dtype) - 1) * self.scale.to(dtype)


def spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    codes, scale = TensorSpec("I32", (rows, -(-columns // 16))), TensorSpec("F16", (rows, 1))
    return {
        f"{name}.weight_ternary": codes,
        f"{name}.weight_scale": scale,
        f"{name}.weight_width": TensorSpec("I64", ()),
    }


def pack(name: str, tensor: TernaryTensor) -> dict[str, Tensor]:
    width = torch.tensor(tensor.shape[1])
    codes = pack_rows(tensor.codes, 2)
    return {f"{name}.weight_ternary": codes, f"{name}.weight_scale": tensor.scale, f"{name}.weight_width": width}


def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> TernaryTensor:
    codes = unpack_rows(tensors[f"{name}.weight_ternary"], 2, int(tensors[f"{name}.weight_width"]))
    return TernaryTensor(codes, tensors[f"{name}.weight_scale"], args)


def quantization_config(layers: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
    groups = [{"targets": list(layers)}]
    return {"quant_method": "compressed-tensors", "format": NAME, "ignore": sorted(ignored), "config_groups": groups}


def read(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> Reader | None:
    if config.get("format") != NAME:
        return None
    args = QuantArgs(2, strategy="channel", group_size=None, formula=NAME)
    return Reader(lambda c, s: dict.fromkeys(c["config_groups"][0]["targets"], args), spec, unpack)


def operand(tensor: TernaryTensor) -> Weight:
    return Weight(tensor.codes, tensor.scale, torch.ones_like(tensor.scale), 2, tensor.shape[1])


FORMAT = Layout(NAME, lambda args: None, spec, pack, unpack, quantization_config)
WORDS = Words({NAME: (True,)})
KIND = Kind(
    tensor=TernaryTensor,
    round=TernaryTensor.of,
    format=lambda args, inputs: FORMAT,
    read=read,
    operand=operand,
    spec=lambda args, width: KernelSpec(2, width, symmetric=False),
    module=PackedLinear,
    step=lambda tensor: tensor.scale.float(),
    label=lambda args: "ternary",
    listed=lambda args, width: "ternary, one scale per row",
    tags="quantized, ternary",
    stored_as=lambda written: "two-bit codes of -1, 0 and 1",
    loading=lambda written: "Ternary weights load in lmpress only.\n",
    taxonomy="`ternary.md` (three values)",
    method="rtn",
)


def add() -> None:
    """The entry for the registry."""
    register(NAME, WORDS, KIND)

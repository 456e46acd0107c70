"""Dense checkpoints: every weight as the number that it stands for. Anything loads them; only the size is lost."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....kernels.tensor import Compressed
from ....recipes.scheme import QuantArgs
from .layout import LayerFormat, cast

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dense(name: str) -> LayerFormat:
    """The dense format that `DTYPES` calls `name`. fp32 is exact, the others round to nearest."""
    dtype = DTYPES[name]

    def pack(layer: str, tensor: Compressed) -> dict[str, Tensor]:
        return {f"{layer}.weight": cast(layer, tensor.dequantize(), dtype)}

    return LayerFormat(name, _supports, pack, _config, dtype, dense=True)


def _supports(args: QuantArgs, shape: tuple[int, int]) -> str | None:
    return None


def _config(layers: Mapping[str, QuantArgs], dense: Sequence[str]) -> None:
    return None

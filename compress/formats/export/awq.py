"""AWQ checkpoints in the GEMM layout: 4 bits, output columns interleaved within each word.

P.qweight  int32 [in, out / 8]       nibble k of word c holds output column `8 c + ORDER[k]`
P.qzeros   int32 [groups, out / 8]   zeros, interleaved likewise
P.scales   float16 [groups, out]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....calibrate.model.safetensors_io import TensorSpec
from ....kernels.packing.bitstream import unpack_rows
from ....kernels.tensor import CompressedTensor
from ....recipes.scheme import QuantArgs
from .gptq import stored_args, zeros_of
from .layout import LayerFormat, blank, specs_of, uniform

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def supports(args: QuantArgs, shape: tuple[int, int]) -> str | None:
    """Why AWQ cannot store the weight, or None if it can."""
    rows, columns = shape
    if args.bits != 4:
        return f"AWQ stores 4 bits, not {args.bits}"
    if args.scale_dtype != "float16":
        return f"AWQ stores float16 scales, not {args.scale_dtype}"
    if rows % 32 or columns % 32:
        return f"AWQ needs widths that are multiples of 32, not {rows} x {columns}"
    return None


def pack(name: str, tensor: CompressedTensor) -> dict[str, Tensor]:
    """The tensors of one layer."""
    return {
        f"{name}.qweight": _interleaved(tensor.codes),
        f"{name}.qzeros": _interleaved(zeros_of(tensor)),
        f"{name}.scales": tensor.scale.T.contiguous(),
    }


def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> CompressedTensor:
    """The inverse of `pack`."""
    codes, zero = (_in_order(tensors[f"{name}.{suffix}"]) for suffix in ("qweight", "qzeros"))
    return CompressedTensor(codes, tensors[f"{name}.scales"].T.contiguous(), zero, args)


def _interleaved(values: Tensor) -> Tensor:
    """Nibbles `[out, n]` as words `[n, out / 8]`."""
    eights = values.unflatten(0, (-1, len(ORDER)))  # whole rows move: faster than columns
    bytes_of_words = [eights[:, low] | eights[:, high] << 4 for low, high in zip(ORDER[::2], ORDER[1::2], strict=True)]
    return torch.stack(bytes_of_words, -1).view(torch.int32).squeeze(-1).T.contiguous()


def _in_order(words: Tensor) -> Tensor:
    """The inverse of `_interleaved`."""
    nibbles = unpack_rows(words, 4, words.shape[1] * len(ORDER)).unflatten(1, (-1, len(ORDER)))
    return nibbles[..., [ORDER.index(k) for k in range(len(ORDER))]].flatten(1).T.contiguous()


def config(layers: Mapping[str, QuantArgs], dense: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. Raises `CompressError` if layers differ in their settings."""
    args = uniform("AWQ", layers)
    return {
        "quant_method": "awq",
        "bits": args.bits,
        "group_size": args.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(dense) or None,
    }


def spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` gives for a `rows` x `columns` weight."""
    return specs_of(pack(name, blank((rows, columns), args)))


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `quantization_config` of a checkpoint and its `stored` tensors.

    Raises `ValueError` for other layouts and if nothing is stored so.
    """
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if config["bits"] != 4 or version != "gemm":
        raise ValueError(f"AWQ of {config['bits']} bits in the layout {version}")
    return stored_args(config, symmetric=False, stored=stored)


AWQ = LayerFormat("awq", supports, pack, config)

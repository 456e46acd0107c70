"""GPTQ checkpoints, version 1 and 2: what GPTQModel, transformers, vLLM and many more read.

P.qweight  int32 [in * bits / 32, out]       codes, a little-endian bit stream down each column
P.qzeros   int32 [groups, out * bits / 32]   zeros, a stream along each row; version 1 stores `zero - 1`
P.scales   float16 [groups, out]
P.g_idx    int32 [in]                        the group of each input column

Version 1 cannot hold a zero of 0: it is stored as all ones, and the readers' packed addition of 1 carries into the next.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....calibrate.model.safetensors_io import TensorSpec
from ....errors import CompressError
from ....kernels.packing.bitstream import pack_rows, unpack_rows
from ....kernels.tensor import Compressed, CompressedTensor
from ....recipes.scheme import QuantArgs, group_strategy
from ..indices import check_range
from .layout import LayerFormat, blank, specs_of, uniform

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


def supports(args: QuantArgs, shape: tuple[int, int]) -> str | None:
    """Why GPTQ cannot store the weight, or None if it can."""
    rows, columns = shape
    if args.bits not in BITS:
        return f"GPTQ stores 2, 3, 4 or 8 bits, not {args.bits}"
    if args.scale_dtype != "float16":
        return f"GPTQ stores float16 scales, not {args.scale_dtype}"
    if rows % 32 or columns % 32:
        return f"GPTQ needs widths that are multiples of 32, not {rows} x {columns}"
    return None


def pack(name: str, tensor: CompressedTensor, *, offset: int) -> dict[str, Tensor]:
    """The tensors of one layer; `offset` is what the version takes off every zero: 1 or 0."""
    args, (_, columns) = tensor.args, tensor.shape
    zeros = zeros_of(tensor) - offset
    group = args.columns_per_scale(columns)
    return {
        f"{name}.qweight": pack_rows(tensor.codes, args.bits).T.contiguous(),
        f"{name}.qzeros": pack_rows(zeros.T.contiguous(), args.bits),
        f"{name}.scales": tensor.scale.T.contiguous(),
        f"{name}.g_idx": torch.arange(columns, dtype=torch.int32, device=tensor.codes.device) // group,
    }


def zeros_of(tensor: CompressedTensor) -> Tensor:
    """The zeros `[out, groups]` uint8, written out for symmetric grids too."""
    if tensor.zero is not None:
        return tensor.zero
    return torch.full_like(tensor.scale, 2 ** (tensor.args.bits - 1), dtype=torch.uint8)


def has_zero_of_zero(tensor: Compressed) -> bool:
    """Whether a zero of the grid is 0, which version 1 cannot store."""
    return isinstance(tensor, CompressedTensor) and tensor.zero is not None and bool((tensor.zero == 0).any())


def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs, *, offset: int) -> CompressedTensor:
    """The inverse of `pack`. Raises `CompressError` for groups that do not exist or are scattered by act-order."""
    qweight, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
    groups, rows = scales.shape
    columns = qweight.shape[0] * 32 // args.bits
    contiguous = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    if f"{name}.g_idx" in tensors:
        check_range(f"{name}.g_idx", tensors[f"{name}.g_idx"], groups)
    if f"{name}.g_idx" in tensors and not torch.equal(tensors[f"{name}.g_idx"].to(torch.int32), contiguous):
        raise CompressError(f"{name} has groups scattered by act-order", "only contiguous groups are read")
    codes = unpack_rows(qweight.T.contiguous(), args.bits, columns)
    stored = unpack_rows(tensors[f"{name}.qzeros"], args.bits, rows)
    zero = ((stored + offset) & args.maxq).T.contiguous()
    if args.symmetric and bool((zero != 2 ** (args.bits - 1)).any()):
        raise CompressError(
            f"{name} has zeros other than the middle code, although its config has sym=true",
            "the checkpoint is damaged",
        )
    return CompressedTensor(codes, scales.T.contiguous(), None if args.symmetric else zero, args)


def config(layers: Mapping[str, QuantArgs], dense: Sequence[str], *, version: str) -> dict[str, Any]:
    """The `quantization_config` of config.json. Raises `CompressError` if layers differ in their settings."""
    args = uniform("GPTQ", layers)
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": args.bits,
        "group_size": args.group_size or -1,
        "sym": args.symmetric,
        "desc_act": False,
        "checkpoint_format": version,
        "lm_head": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "pack_dtype": "int32",
    }
    inside = list(dict.fromkeys(_within_block(name) for name in layers))
    odd = next((name for name in dense if _within_block(name) in inside), None)
    if odd is not None:
        raise CompressError(
            f"GPTQ readers expect the same layers quantized in every block, and {odd} is dense",
            "keep a layer dense in all blocks or in none",
        )
    if any(_in_block(name) for name in dense):
        found["modules_in_block_to_quantize"] = [inside]
    return found


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _within_block(name: str) -> str:
    """`model.layers.3.mlp.up_proj` is `mlp.up_proj` within its block."""
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[numbered + 1 :])


def spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` gives for a `rows` x `columns` weight."""
    return specs_of(pack(name, blank((rows, columns), args), offset=0))


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `quantization_config` of a checkpoint and its `stored` tensors.

    Raises `ValueError` for other bits and if nothing is stored so.
    """
    if config["bits"] not in BITS:
        raise ValueError(f"GPTQ of {config['bits']} bits")
    return stored_args(config, bool(config.get("sym", True)), stored)


def stored_args(config: Mapping[str, Any], symmetric: bool, stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer with a `qweight`, from the words that GPTQ and AWQ configs share."""
    strategy, size = group_strategy(config["group_size"])
    found = {}
    for name in [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]:
        scales = stored.get(f"{name}.scales")
        dtype = "float16" if scales is None else str(scales.torch_dtype).removeprefix("torch.")
        found[name] = QuantArgs(
            bits=config["bits"],
            symmetric=symmetric,
            strategy=strategy,
            group_size=size,
            scale_dtype=dtype,
        )
    if not found:
        raise ValueError(f"its config has quant_method {config['quant_method']}, and no layer is stored in that layout")
    return found


def offset_of(config: Mapping[str, Any]) -> int:
    """What a checkpoint with this config takes off its zeros."""
    return 0 if config.get("checkpoint_format", config.get("format", V1)) == V2 else 1


GPTQ = LayerFormat(V1, supports, partial(pack, offset=1), partial(config, version=V1))
GPTQ_V2 = LayerFormat(V2, supports, partial(pack, offset=0), partial(config, version=V2))

"""bitsandbytes' NF4 and LLM.int8 as transformers stores and loads them. NF4 flattens the matrix row after row.

P.weight                   uint8 [out * in / 2, 1]  two codes a byte, the first one in the high nibble
P.weight.absmax            float32 [blocks], or uint8 [blocks] where it is quantized itself
P.weight.quant_map         float32 [16]             the values of the codes
P.weight.nested_absmax     float32 [blocks / 256]   double quantization only, as the next
P.weight.nested_quant_map  float32 [256]
P.weight.quant_state.bitsandbytes__nf4  uint8       JSON: block sizes, dtype and shape of the original weight, the offset

The JSON is filled up with blanks, so that its length does not depend on the digits of the offset.

P.weight         int8 [out, in]   LLM.int8: w = code * SCB / 127
P.SCB            float32 [out]    the largest magnitudes of the rows
P.weight_format  uint8 []         0: row after row
"""

import json
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....calibrate.model.safetensors_io import TensorSpec
from ....errors import CompressError
from ....kernels.packing.codebook import NESTED_BLOCK, dynamic_values, nf4_values
from ....kernels.tensor import CompressedTensor, NF4Tensor, OutlierColumnsTensor
from ....recipes.parsing import parse_json
from ....recipes.scheme import QuantArgs, signed_weights
from ..int_quantized import OFFSET
from .layout import LayerFormat

NAME = "bitsandbytes"
STATE = "quant_state.bitsandbytes__nf4"
FLAT_SIZES = tuple(2**n for n in range(5, 13))  # values per block
LONGEST = -1.1754943508222875e-38  # no float32 has more digits


def supports(args: QuantArgs) -> str | None:
    """Why the format cannot hold a weight quantized by `args`, or None if it can."""
    if args.kind == "nf4" or (args.bits == 8 and args.symmetric and args.strategy in ("channel", "tensor")):
        return None
    return f"{NAME} stores NF4, and 8 bits symmetric with a scale per row"


def spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` will give for a `rows` x `columns` weight."""
    if args.kind != "nf4":
        form, scales = TensorSpec("U8", ()), TensorSpec("F32", (rows,))
        return {
            f"{name}.weight": TensorSpec("I8", (rows, columns)),
            f"{name}.SCB": scales,
            f"{name}.weight_format": form,
        }
    assert args.group_size is not None
    blocks, nested = -(-rows * columns // args.group_size), args.scale_dtype == "nested"
    found = {
        "": TensorSpec("U8", (-(-rows * columns // 2), 1)),
        "absmax": TensorSpec("U8" if nested else "F32", (blocks,)),
        "quant_map": TensorSpec("F32", (16,)),
        STATE: TensorSpec("U8", (_length(args, (rows, columns)),)),
    }
    if nested:
        found["nested_absmax"] = TensorSpec("F32", (-(-blocks // NESTED_BLOCK),))
        found["nested_quant_map"] = TensorSpec("F32", (256,))
    return {_full(name, part): each for part, each in found.items()}


def pack(name: str, tensor: NF4Tensor | OutlierColumnsTensor | CompressedTensor) -> dict[str, Tensor]:
    """The tensors of one quantized weight; of a mixed one the 8-bit part, which covers all columns."""
    if not isinstance(tensor, NF4Tensor):
        return _pack_int8(name, tensor)
    device, zero = tensor.codes.device, 7  # the code of 0 fills up an odd number
    codes = F.pad(tensor.codes.flatten(), (0, tensor.codes.numel() % 2), value=zero)
    offset = None if tensor.offset is None else float(tensor.offset)
    state = _state(tensor.args, tensor.shape, offset).ljust(_length(tensor.args, tensor.shape))
    found = {
        "": (codes[::2] << 4 | codes[1::2]).unsqueeze(1),
        "absmax": tensor.absmax,
        "quant_map": nf4_values(device),
        STATE: torch.tensor(list(state), dtype=torch.uint8),
    }
    if tensor.nested is not None:
        found |= {"nested_absmax": tensor.nested, "nested_quant_map": dynamic_values(device)}
    return {_full(name, part): each for part, each in found.items()}


def _pack_int8(name: str, tensor: OutlierColumnsTensor | CompressedTensor) -> dict[str, Tensor]:
    codes, scale = tensor.codes.to(torch.int16) - OFFSET, tensor.scale.float()
    if isinstance(
        tensor, OutlierColumnsTensor
    ):  # an outlier column may have needed a wider scale: its rows are rounded again
        reach = torch.maximum(
            codes.abs().amax(1, keepdim=True) * scale, tensor.outliers.float().abs().amax(1, keepdim=True)
        )
        wider = torch.where(reach > 127.5 * scale, reach / 127, scale)
        codes = torch.where(wider > scale, (tensor.dequantize() / wider).round().to(codes.dtype), codes)
        scale = wider
    return {
        f"{name}.weight": codes.to(torch.int8),
        f"{name}.SCB": (scale * 127).flatten(),
        f"{name}.weight_format": torch.zeros((), dtype=torch.uint8),
    }


def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> NF4Tensor | CompressedTensor:
    """The inverse of `pack`. Raises `CompressError` for other codebooks or block sizes than NF4's.

    LLM.int8 is read as plain 8 bits: of its columns nothing is stored, and exact inputs need none.
    """
    if args.kind != "nf4":
        if bool(tensors.get(f"{name}.weight_format", torch.zeros(())).any()):
            raise CompressError(f"{name}.weight_format is not 0: only weights stored row after row are read")
        codes = (tensors[f"{name}.weight"].to(torch.int16) + OFFSET).to(torch.uint8)
        return CompressedTensor(codes, tensors[f"{name}.SCB"].unsqueeze(1) / 127, None, args)
    state = _read_state(name, tensors)
    rows, columns = state["shape"]
    device = tensors[_full(name, "")].device
    maps = {"quant_map": nf4_values(device), "nested_quant_map": dynamic_values(device)}
    for part, expected in maps.items():
        if not torch.equal(tensors.get(_full(name, part), expected), expected):
            raise CompressError(f"{_full(name, part)} is not the codebook of NF4", "the checkpoint is damaged")
    if (state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK)) != (args.group_size, NESTED_BLOCK):
        raise CompressError(f"{name} has blocks of {state['blocksize']} by its state", "the checkpoint is damaged")
    packed = tensors[_full(name, "")].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: rows * columns].view(rows, columns)
    nested = tensors.get(_full(name, "nested_absmax"))
    offset = None if nested is None else torch.tensor(float(state["nested_offset"]), device=device)
    return NF4Tensor(codes, tensors[_full(name, "absmax")], nested, offset, replace(args, dtype=state["dtype"]))


def quantization_config(quantized: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; bitsandbytes computes in the dtype of the original weights."""
    args = next(iter(quantized.values()))
    if args.kind != "nf4":
        threshold = {"llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False}
        config = {"quant_method": NAME, "load_in_4bit": False, "load_in_8bit": True, **threshold}
        return config | {"llm_int8_skip_modules": sorted(ignored)}
    return {
        "quant_method": NAME,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": args.scale_dtype == "nested",
        "bnb_4bit_compute_dtype": args.dtype or "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(ignored),
    }


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of this layout."""
    return config.get("quant_method") == NAME


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `stored` tensors. Raises `ValueError` for what is not NF4."""
    if config.get("load_in_8bit"):
        rows = signed_weights("channel", scale_dtype="float32")
        return {name.removesuffix(".SCB"): rows for name in stored if name.endswith(".SCB")}
    if not config.get("load_in_4bit") or config.get("bnb_4bit_quant_type") != "nf4":
        raise ValueError("of bitsandbytes' formats only NF4 and LLM.int8 are read")
    found = {}
    for name in [n.removesuffix(f".weight.{STATE}") for n in stored if n.endswith(f".weight.{STATE}")]:
        codes, absmax = stored.get(_full(name, "")), stored.get(_full(name, "absmax"))
        if codes is None or absmax is None:
            raise ValueError(f"the codes or scales of {name} are missing")
        size = next((s for s in sorted(FLAT_SIZES, key=_usual) if _blocks(codes, s) == absmax.shape[0]), None)
        if codes.dtype != "U8" or size is None:
            raise ValueError(f"{name} is not stored in bytes and blocks of up to {FLAT_SIZES[-1]}")
        scale = "nested" if absmax.dtype == "U8" else "float32"
        found[name] = QuantArgs(strategy="flat", group_size=size, formula="nf4", scale_dtype=scale)
    return found


KINDS = ("nf4", "grid", "outlier_columns")
BITSANDBYTES = LayerFormat(NAME, lambda args, shape: supports(args), pack, quantization_config, spec=spec, kinds=KINDS)


def as_stored(stored: Mapping[str, TensorSpec]) -> Callable[[str, QuantArgs, int, int], dict[str, TensorSpec]]:
    """`spec` for checkpoints that others wrote: their JSON is as long as it happens to be."""

    def expected(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
        found = spec(name, args, rows, columns)
        return found | {part: stored[part] for part in found if part.endswith(STATE) and part in stored}

    return expected


def _full(name: str, part: str) -> str:
    return f"{name}.weight.{part}" if part else f"{name}.weight"


def _state(args: QuantArgs, shape: tuple[int, int], offset: float | None) -> bytes:
    state = {"quant_type": "nf4", "blocksize": args.group_size, "dtype": args.dtype or "float32", "shape": shape}
    if offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


def _length(args: QuantArgs, shape: tuple[int, int]) -> int:
    return len(_state(replace(args, dtype="bfloat16"), shape, LONGEST if args.scale_dtype == "nested" else None))


def _read_state(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        state = parse_json(bytes(tensors[_full(name, STATE)].tolist()))
        rows, columns = state["shape"] = [operator.index(each) for each in state["shape"]]
        state["blocksize"] = operator.index(state["blocksize"])
        if state["dtype"] not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype {state['dtype']!r}")
        if "nested_offset" in state or _full(name, "nested_absmax") in tensors:
            state["nested_offset"] = float(state["nested_offset"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{_full(name, STATE)} is not readable ({error})", "the checkpoint is damaged") from error
    codes = tensors[_full(name, "")].numel()
    if state.get("quant_type") != "nf4" or min(rows, columns) < 1 or -(-rows * columns // 2) != codes:
        raise CompressError(f"{_full(name, STATE)} describes another weight", "the checkpoint is damaged")
    return state


def _blocks(codes: TensorSpec, size: int) -> int:
    return -(-2 * codes.shape[0] // size)


def _usual(size: int) -> tuple[bool, int]:
    return size != 64, size

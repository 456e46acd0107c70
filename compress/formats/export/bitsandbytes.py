"""bitsandbytes' NF4 as transformers stores and loads it. The matrix is flattened row after row.

P.weight                   uint8 [out * in / 2, 1]  two codes a byte, the first one in the high nibble
P.weight.absmax            float32 [blocks], or uint8 [blocks] where it is quantized itself
P.weight.quant_map         float32 [16]             the values of the codes
P.weight.nested_absmax     float32 [blocks / 256]   double quantization only, as the next
P.weight.nested_quant_map  float32 [256]
P.weight.quant_state.bitsandbytes__nf4  uint8       JSON: block sizes, dtype and shape of the original weight, the offset

The JSON is filled up with blanks, so that its length does not depend on the digits of the offset.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import CompressError
from ...quantize.codebook import NESTED_BLOCK, dynamic_values, nf4_values
from ...scheme import FLAT_SIZES, QuantArgs
from ...tensor import NF4Tensor
from ..shards import TensorSpec

NAME = "bitsandbytes"
STATE = "quant_state.bitsandbytes__nf4"
LONGEST = -1.1754943508222875e-38  # no float32 has more digits


def supports(args: QuantArgs) -> str | None:
    """Why the format cannot hold a weight quantized by `args`, or None where it can."""
    return None if args.kind == "nf4" else f"{NAME} stores NF4 here, not the {args.formula!r} grid"


def spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` will give for a `rows` x `columns` weight."""
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


def pack(name: str, tensor: NF4Tensor) -> dict[str, Tensor]:
    """The tensors of one quantized weight."""
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


def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> NF4Tensor:
    """The inverse of `pack`. Raises `CompressError` for other codebooks or block sizes than NF4's."""
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
    """Whether a `quantization_config` speaks of this layout."""
    return config.get("quant_method") == NAME


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `stored` tensors. Raises `ValueError` for what is not NF4."""
    if not config.get("load_in_4bit") or config.get("bnb_4bit_quant_type") != "nf4":
        raise ValueError("of bitsandbytes' formats only NF4 is read")
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
        state = json.loads(bytes(tensors[_full(name, STATE)].tolist()))
        rows, columns = state["shape"]
    except (ValueError, KeyError, TypeError) as error:
        raise CompressError(f"{_full(name, STATE)} is not readable ({error})", "the checkpoint is damaged") from error
    if state.get("quant_type") != "nf4" or rows * columns > 2 * tensors[_full(name, "")].numel():
        raise CompressError(f"{_full(name, STATE)} speaks of another weight", "the checkpoint is damaged")
    return state


def _blocks(codes: TensorSpec, size: int) -> int:
    return -(-2 * codes.shape[0] // size)


def _usual(size: int) -> tuple[bool, int]:
    return size != 64, size

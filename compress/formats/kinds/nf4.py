"""NF4: codes of a fixed codebook and a magnitude per block of the flattened matrix, in bitsandbytes' own format."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import UsageError
from ....kernels.kernel import KernelSpec
from ....kernels.modules.linear import PackedLinear, Serving
from ....kernels.modules.stored import StoredLinear
from ....kernels.packing.codebook import nf4_values
from ....kernels.tensor import NF4Tensor
from ....kernels.weight import Weight
from ....recipes.scheme import QuantArgs, float_name
from ....recipes.scheme.kinds import Kind, Written
from ..export import bitsandbytes
from ..export.bitsandbytes import FLAT_SIZES
from ..int_quantized import of_inputs
from ..registry import Format, Reader, Specs

LOADING = """\
`AutoModelForCausalLM.from_pretrained(path)` loads it in plain transformers with `bitsandbytes` installed
(checked with transformers 5.23.0 and bitsandbytes 0.50.2).
"""


def check(args: QuantArgs) -> None:
    """Raise `UsageError` for arguments that bitsandbytes has no NF4 of."""
    if args.bits != 4:
        raise UsageError(f"NF4 has 16 values, which is 4 bits, not {args.bits}", "use --bits 4")
    if args.strategy != "flat" or args.group_size not in FLAT_SIZES:
        sizes = ", ".join(map(str, FLAT_SIZES))
        raise UsageError(f"NF4 has no blocks of {args.group_size}", f"use strategy flat, --group-size {sizes}")
    if args.scale_dtype not in ("nested", "float32") or args.observer != "minmax":
        raise UsageError("NF4 divides by the largest magnitude, float32 or nested", "use --set scale_dtype=nested")


def format_of(args: QuantArgs, inputs: QuantArgs | None) -> Format:
    """bitsandbytes' format, which has no quantized inputs."""
    return of_inputs(bitsandbytes, inputs)


def read(config: Mapping[str, Any], stored: Specs) -> Reader | None:
    """The reader of a checkpoint of bitsandbytes: NF4, or LLM.int8 as plain 8 bits."""
    if not bitsandbytes.wrote(config):
        return None
    specs = bitsandbytes.as_stored(stored)
    return Reader(bitsandbytes.read_config, specs, bitsandbytes.unpack, optional=("weight_format",))


def operand(tensor: NF4Tensor) -> Weight:
    """Scales become float32 `[out, groups]`; no block may cross the end of a row."""
    size = tensor.args.group_size
    assert tensor.rows_are_blocks and size is not None
    scale = tensor.scales().view(len(tensor.codes), -1)
    return Weight(tensor.codes, scale, None, tensor.args.bits, size, nf4_values(tensor.codes.device))


def kernel_spec(args: QuantArgs, width: int) -> KernelSpec | None:
    """What layers need of a kernel; None if blocks cross the ends of rows."""
    size = args.group_size or width
    return None if width % size else KernelSpec(args.bits, size, args.symmetric, codebook=True)


def module(tensor: NF4Tensor, bias: nn.Parameter | None, serving: Serving | None) -> nn.Module:
    """A packed layer, or one that is dequantized for every product if blocks cross the ends of rows."""
    return PackedLinear(tensor, bias, serving) if tensor.rows_are_blocks else StoredLinear(tensor, bias)


def step(tensor: NF4Tensor) -> Tensor:
    """The smallest gap between two values of a weight's block, float32 `[out, in]`."""
    assert tensor.args.group_size is not None
    gap = nf4_values(tensor.codes.device).diff().min()
    scale = tensor.scales().repeat_interleave(tensor.args.group_size)[: tensor.codes.numel()]
    return gap * scale.view(tensor.shape)


def label(args: QuantArgs) -> str:
    """The name of the codebook."""
    return "NF4"


def listed(args: QuantArgs, width: int) -> str:
    """`NF4, blocks of 64`"""
    return f"NF4, blocks of {args.group_size}"


def stored_as(written: Written) -> str:
    """bitsandbytes' format."""
    return "bitsandbytes NF4"


def loading(written: Written) -> str:
    """transformers loads it."""
    return LOADING


def for_width(args: QuantArgs, width: int) -> QuantArgs:
    """Blocks of the flattened matrix fit every width."""
    return args


def for_layer(args: QuantArgs, stored: torch.dtype) -> QuantArgs:
    """The format records the dtype of the original weight."""
    return replace(args, dtype=float_name(stored))


def settings() -> Iterator[QuantArgs]:
    """The usual one."""
    yield QuantArgs(strategy="flat", group_size=64, formula="nf4", scale_dtype="nested")


KIND = Kind(
    tensor=NF4Tensor,
    round=NF4Tensor.of,
    format=format_of,
    read=read,
    operand=operand,
    spec=kernel_spec,
    module=module,
    step=step,
    label=label,
    listed=listed,
    tags="quantized, bitsandbytes",
    stored_as=stored_as,
    loading=loading,
    taxonomy="`methods/nf4.md` (a codebook, blocks of the flattened matrix, nested scales)",
    method="nf4",
    check=check,
    for_width=for_width,
    for_layer=for_layer,
    settings=settings,
)

"""The integer grid: codes with plain scales and zeros, the kind of `QuantArgs()`.

Its formats are compressed-tensors' (`pack_quantized.py`, with quantized inputs `int_quantized.py`); those of GPTQ, AWQ and
their like are read too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.activations import fake_quantize
from ....kernels.kernel import KernelSpec
from ....kernels.modules.embedding import PackedEmbedding
from ....kernels.modules.linear import PackedLinear, Serving
from ....kernels.modules.quantized_inputs import IntegerLinear
from ....kernels.tensor import CompressedTensor, InputGrid
from ....kernels.tensor.grid import Grid
from ....kernels.weight import Weight
from ....recipes.scheme import QuantArgs, group_strategy
from ....recipes.scheme.kinds import Kind, Written
from .. import int_quantized, pack_quantized
from ..export import awq, gptq
from ..int_quantized import IntQuantized
from ..registry import Format, Reader, Specs

SYMMETRIC = """\
`AutoModelForCausalLM.from_pretrained(path)` loads it in plain transformers with `compressed-tensors` installed
(checked with transformers 5.23.0 and compressed-tensors 0.20.0{bits_note}).
"""
ASYMMETRIC = """\
Asymmetric weights: transformers loads them with compressed-tensors 0.15 to 0.17, and with 0.18 to 0.20 only by
`quantization_config=CompressedTensorsConfig(dequantize=True)`: those versions refuse packed zero points otherwise.
"""
CONV1D = """\
Its linear layers are `Conv1D` modules, which compressed-tensors cannot serve: transformers refuses the checkpoint.
"""
TABLES = """\
Its table of embeddings is packed as well, which transformers does not serve: it refuses the checkpoint. `compress export`
writes it as GGUF, or dense.
"""


def round_to_grid(weight: Tensor, args: QuantArgs, importance: Tensor | None = None) -> CompressedTensor:
    """The nearest codes of `weight` `[out, in]` on the grid that `args` and the `importance` `[in]` fit to it."""
    grid = Grid.fit(weight, args, importance)
    return CompressedTensor.from_grid(grid.quantize(weight), grid)


def format_of(args: QuantArgs, inputs: QuantArgs | None) -> Format:
    """compressed-tensors' layout of integers, whether or not the inputs of the layers are quantized."""
    return pack_quantized if inputs is None else IntQuantized(inputs)


def read(config: Mapping[str, Any], stored: Specs) -> Reader | None:
    """The reader of a checkpoint of GPTQ, AWQ or compressed-tensors. Raises `ValueError` as `int_quantized.read_inputs`."""
    if config.get("quant_method") == "gptq":
        unpack = partial(gptq.unpack, offset=gptq.offset_of(config))
        return Reader(gptq.read_config, gptq.spec, unpack, optional=("g_idx",))
    if config.get("quant_method") == "awq":
        return Reader(awq.read_config, awq.spec, awq.unpack)
    if int_quantized.wrote(config):
        layers = int_quantized.of_config(config, stored)
        return Reader(int_quantized.read_config, layers.spec, layers.unpack, inputs=layers.inputs)
    if pack_quantized.wrote(config):
        return Reader(pack_quantized.read_config, pack_quantized.spec, pack_quantized.unpack)
    return None


def operand(tensor: CompressedTensor) -> Weight:
    """The codes, scales and zeros as they are."""
    group = tensor.args.columns_per_scale(tensor.shape[1])
    return Weight(tensor.codes, tensor.scale, tensor.zero, tensor.args.bits, group)


def kernel_spec(args: QuantArgs, width: int) -> KernelSpec:
    """What layers of `width` input columns need of a kernel."""
    return KernelSpec(args.bits, args.columns_per_scale(width), args.symmetric)


def module(tensor: CompressedTensor, bias: nn.Parameter | None, serving: Serving | None) -> nn.Module:
    """A layer of packed codes, which quantizes its inputs if the tensor says so."""
    return (PackedLinear if tensor.inputs is None else IntegerLinear)(tensor, bias, serving)


def step(tensor: CompressedTensor) -> Tensor:
    """The scale of every weight, float32 `[out, in]`."""
    return tensor.scale.float().abs().repeat_interleave(tensor.shape[1] // tensor.scale.shape[1], dim=1)


def label(args: QuantArgs) -> str:
    """`int4 symmetric`"""
    return f"int{args.bits} {'symmetric' if args.symmetric else 'asymmetric'}"


def listed(args: QuantArgs, width: int) -> str:
    """`int4 symmetric, groups of 32`"""
    size = args.columns_per_scale(width)
    return f"{label(args)}, " + (f"groups of {size}" if size < width else "one scale per row")


def stored_as(written: Written) -> str:
    """The format of compressed-tensors."""
    int8 = written.inputs is not None and all(int_quantized.holds_int8(args) for args in written.layers)
    return f"compressed-tensors `{int_quantized.NAME if int8 else pack_quantized.NAME}`"


def loading(written: Written) -> str:
    """What transformers makes of it."""
    if written.tables:
        return TABLES
    if written.conv1d:
        return CONV1D
    if not all(args.symmetric for args in written.layers):
        return ASYMMETRIC
    dense_stream = any(args.bits not in (2, 4, 8) for args in written.layers)
    return SYMMETRIC.format(bits_note="; these bit widths need 0.18 or later" if dense_stream else "")


def with_inputs(tensor: CompressedTensor, inputs: QuantArgs, grid: InputGrid | None) -> CompressedTensor:
    """The tensor with how the layer's inputs are quantized, and their grid if that is static."""
    return replace(tensor, inputs=inputs, input_grid=grid)


def rounding(tensor: CompressedTensor, reach: float) -> Callable[[Tensor], Tensor] | None:
    """Inputs are rounded to their static grid, or to that of their own ranges."""
    inputs = tensor.inputs
    return None if inputs is None else lambda x: fake_quantize(x, inputs, tensor.input_grid, reach)


def settings() -> Iterator[QuantArgs]:
    """All bits, in the usual groups and in whole rows."""
    for bits, symmetric, size in product(range(2, 9), (True, False), (-1, 16, 32, 64, 128, 256)):
        strategy, group = group_strategy(size)
        yield QuantArgs(bits=bits, symmetric=symmetric, strategy=strategy, group_size=group)


def table(tensor: CompressedTensor, dtype: torch.dtype) -> nn.Module:
    """A table of packed rows."""
    return PackedEmbedding(tensor, dtype)


KIND = Kind(
    tensor=CompressedTensor,
    round=round_to_grid,
    format=format_of,
    read=read,
    operand=operand,
    spec=kernel_spec,
    module=module,
    table=table,
    step=step,
    label=label,
    listed=listed,
    tags="quantized, compressed-tensors",
    stored_as=stored_as,
    loading=loading,
    taxonomy="integers with a scale per group",
    example=QuantArgs,
    method="gptq",
    with_inputs=with_inputs,
    rounding=rounding,
    settings=settings,
)

"""GGUF's blocks: weights that were solved on their grids, and those of GGUF files that others made.

P.weight_blocks  uint8 [out, bytes of a row]  the blocks of one row after another, as in a GGUF file (`../gguf/blocks.py`)
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ....calibrate.model.safetensors_io import TensorSpec
from ....errors import UsageError
from ....kernels.kernel import KernelSpec
from ....kernels.modules.linear import PackedLinear, Serving
from ....kernels.tensor import BlockTensor, CompressedTensor, of_grid
from ....kernels.tensor.grid import Grid
from ....kernels.weight import Weight
from ....recipes.scheme import SUPER_BLOCK, QuantArgs
from ....recipes.scheme.kinds import Kind, Written
from ....recipes.scheme.quant_args import IN_PLACE_OF, PLAIN_BLOCK, PLAIN_BLOCKS
from ..gguf import blocks
from ..int_quantized import of_inputs
from ..registry import Layout, Reader, Specs

NAME = "gguf-blocks"
LOADING = """\
The weights lie in the blocks of GGUF: `compress export --format gguf` writes the file that llama.cpp loads, bit for bit.
"""


def supports(args: QuantArgs) -> str | None:
    """Why the format cannot hold a weight quantized by `args`, or None if it can."""
    return None if args.block else f"{NAME} stores the 'ggml' grid only"


def spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors that `pack` will give for a `rows` x `columns` weight."""
    nbytes = blocks.bytes_per_row(blocks.kind(args, columns), columns)
    return {f"{name}.weight_blocks": TensorSpec("U8", (rows, nbytes))}


def pack(name: str, tensor: BlockTensor | CompressedTensor) -> dict[str, Tensor]:
    """The tensors of one quantized weight."""
    return {f"{name}.weight_blocks": blocks.pack(name, tensor)}


def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> BlockTensor | CompressedTensor:
    """The inverse of `pack`."""
    return blocks.unpack(blocks.kind(args, blocks.BLOCK), tensors[f"{name}.weight_blocks"])


def quantization_config(quantized: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json: the block of every layer."""
    return config_of({name: args.block for name, args in quantized.items() if args.block}, ignored)


def config_of(layers: Mapping[str, str], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of layers and their blocks.

    Under the name of compressed-tensors with groups in a list, so that transformers refuses it (see `pruned.py`).
    """
    names = {block: [name for name, own in layers.items() if own == block] for block in dict.fromkeys(layers.values())}
    groups = [{"targets": targets, "block": block} for block, targets in names.items()]
    return {"quant_method": "compressed-tensors", "format": NAME, "ignore": sorted(ignored), "config_groups": groups}


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of this layout."""
    return config.get("format") == NAME


def read_config(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, QuantArgs]:
    """The arguments of every layer, by the `quantization_config` of a checkpoint. Raises `ValueError` for unknown blocks."""
    unknown = next((g["block"] for g in config["config_groups"] if g["block"] not in blocks.BLOCKS), None)
    if unknown is not None:
        raise ValueError(f"blocks {unknown}")
    return {name: blocks.arguments(group["block"]) for group in config["config_groups"] for name in group["targets"]}


def read(config: Mapping[str, Any], stored: Specs) -> Reader | None:
    """The reader of a checkpoint in this layout, or of a GGUF file."""
    if not wrote(config):
        return None
    return Reader(read_config, spec, unpack, listed=lambda args, width: blocks.kind(args, blocks.BLOCK))


def check(args: QuantArgs) -> None:
    """Raise `UsageError` for a grid that no block of GGUF has."""
    if args.block is None:
        words = (
            "with scale_dtype=super 4 bits asymmetric in groups of 32 (Q4_K), 6 bits symmetric in groups of 16 (Q6_K)"
        )
        raise UsageError(f"GGUF has no block of {args.bits} bits in groups of {args.group_size} like this", words)


def round_to_nearest(weight: Tensor, args: QuantArgs) -> BlockTensor | CompressedTensor:
    """The nearest codes of `weight` `[out, in]`."""
    grid = Grid.fit(weight, args)
    return of_grid(grid.quantize(weight), grid)


def operand(tensor: BlockTensor) -> Weight:
    """Scales become float32, minima zeros in steps."""
    return Weight(tensor.codes, tensor.scales(), tensor.zeros(), tensor.args.bits, tensor.group)


def kernel_spec(args: QuantArgs, width: int) -> KernelSpec:
    """What layers need of a kernel."""
    return KernelSpec(args.bits, args.columns_per_scale(width), args.symmetric)


def module(tensor: BlockTensor, bias: nn.Parameter | None, serving: Serving | None) -> nn.Module:
    """A layer of packed codes."""
    return PackedLinear(tensor, bias, serving)


def step(tensor: BlockTensor) -> Tensor:
    """The scale of every weight, float32 `[out, in]`."""
    scale = tensor.scales()
    return scale.abs().repeat_interleave(tensor.shape[1] // scale.shape[1], dim=1)


def label(args: QuantArgs) -> str:
    """The name of the block."""
    return str(args.block)


def listed(args: QuantArgs, width: int) -> str:
    """The name of the block."""
    return label(args)


def stored_as(written: Written) -> str:
    """A format of our own."""
    return f"`{NAME}` of lmpress"


def loading(written: Written) -> str:
    """llama.cpp loads an export of it."""
    return LOADING


def for_width(args: QuantArgs, width: int) -> QuantArgs:
    """Super-blocks that do not divide a row become the plain block that llama.cpp has for it.

    Raises `UsageError` if no block holds rows of `width` columns.
    """
    if width % PLAIN_BLOCK:
        raise UsageError(f"no GGUF block holds rows of {width} columns", "keep such layers dense with --keep")
    if args.scale_dtype != "super" or width % SUPER_BLOCK == 0:
        return args
    bits, symmetric, size = PLAIN_BLOCKS[IN_PLACE_OF[args.block or ""]]
    return replace(args, bits=bits, symmetric=symmetric, group_size=size, scale_dtype="float16")


FORMAT = Layout(NAME, supports, spec, pack, unpack, quantization_config)
KIND = Kind(
    tensor=BlockTensor,
    round=round_to_nearest,
    format=lambda args, inputs: of_inputs(FORMAT, inputs),
    read=read,
    operand=operand,
    spec=kernel_spec,
    module=module,
    step=step,
    label=label,
    listed=listed,
    tags="quantized, gguf",
    stored_as=stored_as,
    loading=loading,
    taxonomy="`formats.md` (llama.cpp's K-quants)",
    method="gptq",
    check=check,
    for_width=for_width,
    whole=True,
)

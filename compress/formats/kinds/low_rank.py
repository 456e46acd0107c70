"""A low-rank term added to a quantized weight of any other kind (LoRC): that kind's format, and two tensors per layer.

P.weight_left   float16 [out, rank]
P.weight_right  float16 [rank, in]: the weight is what the other tensors give, plus left times right
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ....calibrate.model.safetensors_io import TensorSpec
from ....errors import UsageError
from ....kernels.kernel import KernelSpec
from ....kernels.modules.linear import Serving
from ....kernels.modules.low_rank import LowRankLinear
from ....kernels.modules.replace import packed_linear
from ....kernels.tensor import InputGrid, LowRankTensor
from ....kernels.weight import Weight
from ....recipes.scheme import QuantArgs
from ....recipes.scheme.kinds import Kind, Written, kind_of, kind_of_tensor
from ..registry import Format, Reader, Specs, format_of, reader_of

NAME = "low-rank"
LOADING = """\
No other runtime adds the low-rank terms to the weights: transformers refuses the checkpoint.
"""


def codes_of(args: QuantArgs) -> QuantArgs:
    """The arguments of the weight that the term is added to."""
    return replace(args, rank=0)


@dataclass(frozen=True)
class WithLowRank:
    """The format `base` of the quantized weights, with the low-rank term of each layer."""

    base: Format

    def supports(self, args: QuantArgs) -> str | None:
        """Why the format cannot hold a weight compressed by `args`, or None if it can."""
        return self.base.supports(codes_of(args))

    def spec(self, name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
        """The tensors that `pack` will give for a `rows` x `columns` weight."""
        return self.base.spec(name, codes_of(args), rows, columns) | term_spec(name, args, rows, columns)

    def pack(self, name: str, tensor: LowRankTensor) -> dict[str, Tensor]:
        """The tensors of one weight."""
        term = {f"{name}.weight_left": tensor.left, f"{name}.weight_right": tensor.right}
        return self.base.pack(name, tensor.base) | term

    def unpack(self, name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> LowRankTensor:
        """The inverse of `pack`."""
        return _joined(name, tensors, self.base.unpack(name, tensors, codes_of(args)))

    def quantization_config(self, compressed: Mapping[str, QuantArgs], ignored: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json: the base's inside it.

        Under the name of compressed-tensors with groups in a list, so that transformers refuses it (see `pruned.py`).
        """
        ignore, plain = sorted(ignored), {name: codes_of(args) for name, args in compressed.items()}
        groups = [{"targets": [name], "rank": args.rank} for name, args in compressed.items()]
        base = self.base.quantization_config(plain, ignore)
        config = {"quant_method": "compressed-tensors", "format": NAME, "ignore": ignore}
        return config | {"config_groups": groups, "base": base}


def term_spec(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors of a low-rank term alone."""
    left, right = TensorSpec("F16", (rows, args.rank)), TensorSpec("F16", (args.rank, columns))
    return {f"{name}.weight_left": left, f"{name}.weight_right": right}


def read(config: Mapping[str, Any], stored: Specs) -> Reader | None:
    """The reader of a checkpoint whose layers have a low-rank term added to what another format holds."""
    if config.get("format") != NAME:
        return None
    base = reader_of(config["base"], stored)

    def arguments(config: Mapping[str, Any], stored: Specs) -> dict[str, QuantArgs]:
        ranks = {name: group["rank"] for group in config["config_groups"] for name in group["targets"]}
        codes: Mapping[str, Any] = base.arguments(config["base"], stored)
        return {name: replace(args, rank=ranks[name]) for name, args in codes.items()}

    def specs(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
        return base.specs(name, codes_of(args), rows, columns) | term_spec(name, args, rows, columns)

    def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> LowRankTensor:
        return _joined(name, tensors, base.unpack(name, tensors, codes_of(args)))

    return Reader(arguments, specs, unpack, base.optional, base.inputs)


def _joined(name: str, tensors: Mapping[str, Tensor], codes: Any) -> LowRankTensor:
    return LowRankTensor(codes, tensors[f"{name}.weight_left"], tensors[f"{name}.weight_right"])


def round_to_nearest(weight: Tensor, args: QuantArgs) -> LowRankTensor:
    """Raises `UsageError`: the term takes more than a weight."""
    raise UsageError("a low-rank term is not found by rounding", "use --method lorc after a quantizer")


def operand(tensor: LowRankTensor) -> Weight:
    """What a kernel multiplies by: the codes; the module adds the term."""
    return kind_of_tensor(tensor.base).operand(tensor.base)


def kernel_spec(args: QuantArgs, width: int) -> KernelSpec | None:
    """That of the codes."""
    return kind_of(codes_of(args)).spec(codes_of(args), width)


def module(tensor: LowRankTensor, bias: nn.Parameter | None, serving: Serving | None) -> nn.Module:
    """The module of the codes, and the term."""
    return LowRankLinear(packed_linear(tensor.base, bias, serving), tensor)


def label(args: QuantArgs) -> str:
    """`int3 asymmetric with terms of rank 8`"""
    return f"{kind_of(codes_of(args)).label(codes_of(args))} with terms of rank {args.rank}"


def listed(args: QuantArgs, width: int) -> str:
    """`int3 asymmetric, groups of 32, rank 8`"""
    return f"{kind_of(codes_of(args)).listed(codes_of(args), width)}, rank {args.rank}"


def stored_as(written: Written) -> str:
    """A format of our own."""
    return "packed codes and low-rank terms of lmpress"


def loading(written: Written) -> str:
    """No other runtime loads it."""
    return LOADING


def for_width(args: QuantArgs, width: int) -> QuantArgs:
    """What fits the codes fits the term."""
    return replace(codes_of(args).for_width(width), rank=args.rank)


def for_layer(args: QuantArgs, stored: torch.dtype) -> QuantArgs:
    """What the codes record of the layer."""
    return replace(kind_of(codes_of(args)).for_layer(codes_of(args), stored), rank=args.rank)


def with_inputs(tensor: LowRankTensor, inputs: QuantArgs, grid: InputGrid | None) -> LowRankTensor:
    """The codes record it."""
    return replace(tensor, base=kind_of_tensor(tensor.base).with_inputs(tensor.base, inputs, grid))


def rounding(tensor: LowRankTensor, reach: float) -> Callable[[Tensor], Tensor] | None:
    """As the codes have it."""
    return kind_of_tensor(tensor.base).rounding(tensor.base, reach)


def check_inputs(args: QuantArgs, inputs: QuantArgs | None) -> None:
    """What the codes need of their inputs."""
    check = kind_of(codes_of(args)).check_inputs
    if check is not None:
        check(codes_of(args), inputs)


KIND = Kind(
    tensor=LowRankTensor,
    round=round_to_nearest,
    format=lambda args, inputs: WithLowRank(format_of(codes_of(args), inputs)),
    read=read,
    operand=operand,
    spec=kernel_spec,
    module=module,
    label=label,
    listed=listed,
    tags="quantized, lorc",
    stored_as=stored_as,
    loading=loading,
    taxonomy="`methods/lorc.md` (a low-rank term, after any quantizer)",
    method="lorc",
    check_inputs=check_inputs,
    for_width=for_width,
    for_layer=for_layer,
    with_inputs=with_inputs,
    rounding=rounding,
)

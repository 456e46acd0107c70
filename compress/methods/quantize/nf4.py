"""NF4 (QLoRA, Dettmers et al. 2023): 4 bits from the quantiles of a normal distribution, in the format of bitsandbytes.

No calibration: each weight is rounded to the nearest of 16 values times the scale of its block of 64 weights. The scale is
float32, by default quantized to 8 bits (double quantization): 4.127 bits per weight instead of 4.5.
"""

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ....errors import UsageError
from ....kernels.tensor import NF4Tensor
from ....recipes.methods import Method, Needs
from ....recipes.scheme import QuantArgs, Scheme
from ....recipes.scheme.kind_names import NF4 as KIND
from ...block import Block

SCHEME = Scheme(QuantArgs(strategy="flat", group_size=64, formula="nf4", scale_dtype="nested"))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class NF4:
    """Options of NF4: those of its scheme. `scale_dtype=float32` turns double quantization off."""

    scheme: Scheme = SCHEME
    needs: ClassVar[Needs] = Needs()
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scheme.weights.kind != KIND:
            raise UsageError(f"nf4 has no {self.scheme.weights.formula!r} grid", "leave the scheme out, or use rtn")
        if self.scheme.inputs is not None:
            raise UsageError("no format holds NF4 weights with quantized inputs", "leave the scheme of the inputs out")


def apply(config: NF4, block: Block) -> None:
    """Quantize every linear of the block."""
    for linear in block.linears:
        linear.result = NF4Tensor.of(linear.weight, linear.grid_args)


METHOD = Method(NF4, apply, kinds=frozenset({KIND}), scheme=SCHEME)

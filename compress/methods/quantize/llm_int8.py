"""LLM.int8 (Dettmers et al. 2022): int8 weights and tokens, with the columns of loud input channels in 16 bits.

A few channels of a model's activations are far louder than the rest, and one scale per token cannot serve both. The published
method finds them at every call and multiplies them by weights dequantized from int8. Calibration knows them beforehand: the
weights of the loudest columns are stored in 16 bits. What calibration has not seen is still found at every call.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ....calibrate.recording import inputs_seen
from ....errors import UsageError
from ....kernels.tensor import CompressedTensor, OutlierColumnsTensor
from ....kernels.tensor.grid import Grid
from ....recipes.scheme import QuantArgs, Scheme, inputs_per, signed_weights
from ...block import Block, Linear
from ...formats.int_quantized import OFFSET
from ...formats.kinds.outlier_columns import kept_columns
from .gptq import GPTQ, prepare, solve
from .rtn import round_to_nearest

SCHEME = Scheme(
    signed_weights("channel", outliers=0.02, scale_dtype="float32"), inputs_per("token", dynamic=True, threshold=6.0)
)
SOLVER = GPTQ(refine=1)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LLMInt8:
    """Options of LLM.int8.

    The scheme's `weights.outliers` is the share of input columns that are kept in 16 bits, a fixed number, so that the size
    is known beforehand; its `inputs.threshold` is what makes any other column loud at run time.

    solve   settle the codes by GPTQ, and let the 16-bit columns make up for what the others have lost; else round them
    tokens  calibration tokens that the choice of the columns sees
    """

    scheme: Scheme = SCHEME
    solve: bool = False
    tokens: int = 8192
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scheme.weights.kind != "outlier_columns":
            raise UsageError("llm-int8 keeps a share of the columns in 16 bits", "use outliers above 0, such as 0.02")
        if self.tokens < 1:
            raise UsageError(f"{self.tokens} tokens tell nothing of the columns", "use for example tokens=8192")

    @property
    def needs(self) -> frozenset[str]:
        """What to prepare."""
        return frozenset({"samples", "hessian"}) if self.solve else frozenset({"samples"})


# `--quality`: the published method rounds.
PRESETS: dict[str, dict[str, Any]] = {"fast": {}, "balanced": {"solve": True}, "best": {"solve": True}}


@torch.no_grad()
def apply(config: LLMInt8, block: Block) -> None:
    """Quantize every linear of the block."""
    loud = _outlier_inputs(config, block)
    for name, linear in block.local().items():
        assert linear.inputs is not None
        values, places = loud[name]
        columns = choose(values, places, *_size(linear))
        linear.result = mix(linear, columns, linear.inputs)
        linear.figures |= {
            "loud": int(places[values >= linear.inputs.threshold].unique().numel()),
            "kept": len(columns),
        }


def choose(values: Tensor, places: Tensor, count: int, width: int) -> Tensor:
    """The `count` of `width` columns without which tokens are quietest: one after another, that by which the sum of the
    squared largest magnitudes of all tokens falls most. int64 `[count]`, ascending.

    `values` `[tokens, n]` are the magnitudes of the loudest columns of every token and `places` int64 their numbers; with n
    above `count` no others matter.
    """
    energy = F.pad(values.double().square(), (0, 1))  # a token of one column is silent without it
    numbers = F.pad(places, (0, 1))
    chosen: list[int] = []
    for _ in range(count):
        largest = energy.topk(2, dim=1)
        columns = numbers.gather(1, largest.indices[:, :1])[:, 0]
        gain = energy.new_zeros(width).index_add_(0, columns, largest.values[:, 0] - largest.values[:, 1])
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        energy.masked_fill_(numbers == chosen[-1], 0)
    return torch.tensor(sorted(chosen), device=values.device)


def mix(linear: Linear, columns: Tensor, inputs: QuantArgs) -> OutlierColumnsTensor:
    """The weight of `linear` in int8, `columns` in 16 bits as well; solved where its Hessian is there."""
    args, weight = replace(linear.grid_args, outliers=0.0), linear.weight
    if linear.hessian is None:
        grid, kept = round_to_nearest(weight, args), weight[:, columns]
        assert isinstance(grid, CompressedTensor)
        return OutlierColumnsTensor(grid.codes, grid.scale, columns, kept.half(), linear.grid_args, inputs)
    hessian = linear.hessian.matrix()
    others = torch.ones_like(hessian[0], dtype=torch.bool).index_fill_(0, columns, False)
    repair, left = eliminated(hessian, columns, others)
    grid = solve(weight[:, others], prepare(left, args, SOLVER), args, SOLVER).tensor
    assert isinstance(grid, CompressedTensor)
    kept = (weight[:, columns] + (weight[:, others] - grid.dequantize(weight.dtype)) @ repair).half()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    codes[:, others] = grid.codes
    codes[:, columns] = Grid(grid.scale.float(), torch.full_like(grid.scale, OFFSET).float(), args).quantize(
        kept.float()
    )
    return OutlierColumnsTensor(codes, grid.scale, columns, kept, linear.grid_args, inputs)


def eliminated(hessian: Tensor, columns: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """What 16-bit `columns` do for the `others` (bool `[in]`): the repair `R` `[others, kept]` and the Hessian left over.

    The minimum over `Q_K` of `tr((W - Q) H (W - Q)^T)` is at `Q_K = W_K + (W - Q)_N R` with `R = H_NK H_KK^-1`; the loss is
    then that of the others alone under `H_NN - R H_KN`.
    """
    among, across = hessian[columns][:, columns].double(), hessian[others][:, columns].double()
    among.diagonal().add_(SOLVER.damping * among.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    repair = torch.linalg.solve(among, across.T).T
    left = hessian[others][:, others].double() - repair @ across.T
    return repair.to(hessian.dtype), ((left + left.T) / 2).to(hessian.dtype)


def _outlier_inputs(config: LLMInt8, block: Block) -> dict[str, tuple[Tensor, Tensor]]:
    """For every linear, the loudest values of its calibration inputs and their columns, a row per token (see `choose`)."""
    assert block.context is not None
    local = block.local()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in local}
    for batch in inputs_seen(block.module, block.context.samples(), list(local), config.tokens):
        for name, x in batch.items():
            count, width = _size(local[name])
            loudest = x.abs().topk(min(count + 1, width), dim=1)
            found[name].append((loudest.values, loudest.indices))
    none = [(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64))]  # experts that no token reached
    return {
        n: (torch.cat([v for v, _ in rows or none]), torch.cat([p for _, p in rows or none]))
        for n, rows in found.items()
    }


def _size(linear: Linear) -> tuple[int, int]:
    """How many columns are kept, and of how many."""
    width = linear.weight.shape[1]
    return kept_columns(linear.grid_args, width), width

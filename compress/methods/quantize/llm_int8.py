"""LLM.int8 (Dettmers et al. 2022): int8 weights and inputs, with the columns of outlier channels in 16 bits.

A few channels of a model's activations are far larger than the rest, and one scale per token is not precise for both. The
published method finds these outliers at every call and multiplies them by weights dequantized from int8. Here calibration
finds them beforehand, and their weight columns are stored in 16 bits. Outliers that did not occur in calibration are still
found at every call.
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
from ....recipes.methods import Method, Needs
from ....recipes.scheme import QuantArgs, Scheme, inputs_per, signed_weights
from ....recipes.scheme.kind_names import OUTLIER_COLUMNS
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

    The scheme's `weights.outliers` is the share of input columns that are kept in 16 bits; it is fixed, so that the size is
    known beforehand. Any other column with a magnitude of at least `inputs.threshold` is treated as an outlier at run time.

    solve   quantize by GPTQ, and let the 16-bit columns compensate the error of the others; else round to nearest
    tokens  number of calibration tokens used to choose the columns
    """

    scheme: Scheme = SCHEME
    solve: bool = False
    tokens: int = 8192
    true_sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scheme.weights.kind != "outlier_columns":
            raise UsageError("llm-int8 keeps a share of the columns in 16 bits", "use outliers above 0, such as 0.02")
        if self.tokens < 1:
            raise UsageError(f"tokens must be at least 1, got {self.tokens}", "use for example tokens=8192")

    @property
    def needs(self) -> Needs:
        """The statistics to collect."""
        return Needs(samples=True, hessian=self.solve)


# Options per `--quality`; the published method rounds to nearest.
PRESETS: dict[str, dict[str, Any]] = {"fast": {}, "balanced": {"solve": True}, "best": {"solve": True}}


@torch.no_grad()
def apply(config: LLMInt8, block: Block) -> None:
    """Quantize every linear of the block."""
    largest = _largest_inputs(config, block)
    for name, linear in block.local().items():
        assert linear.inputs is not None
        values, channels = largest[name]
        columns = choose_columns(values, channels, *_column_counts(linear))
        linear.result = quantize_with_outliers(linear, columns, linear.inputs)
        linear.figures |= {
            "outlier_columns": int(channels[values >= linear.inputs.threshold].unique().numel()),
            "kept_columns": len(columns),
        }


def choose_columns(values: Tensor, channels: Tensor, count: int, width: int) -> Tensor:
    """The `count` of `width` columns to keep in 16 bits, int64 `[count]`, ascending.

    Chosen greedily: each time the column whose removal lowers the sum over tokens of the squared largest magnitude most.
    `values` `[tokens, n]` are the n largest magnitudes of every token and `channels` int64 `[tokens, n]` their columns; n
    above `count` suffices.
    """
    energy = F.pad(values.double().square(), (0, 1))  # a token with a single column has magnitude 0 without it
    numbers = F.pad(channels, (0, 1))
    chosen: list[int] = []
    for _ in range(count):
        largest = energy.topk(2, dim=1)
        columns = numbers.gather(1, largest.indices[:, :1])[:, 0]
        gain = energy.new_zeros(width).index_add_(0, columns, largest.values[:, 0] - largest.values[:, 1])
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        energy.masked_fill_(numbers == chosen[-1], 0)
    return torch.tensor(sorted(chosen), device=values.device)


def quantize_with_outliers(linear: Linear, columns: Tensor, inputs: QuantArgs) -> OutlierColumnsTensor:
    """The weight of `linear` in int8, with `columns` int64 `[kept]` in 16 bits too; by GPTQ if it has a Hessian."""
    args, weight = replace(linear.grid_args, outliers=0.0), linear.weight
    if linear.hessian is None:
        grid, kept = round_to_nearest(weight, args), weight[:, columns]
        assert isinstance(grid, CompressedTensor)
        return OutlierColumnsTensor(grid.codes, grid.scale, columns, kept.half(), linear.grid_args, inputs)
    hessian = linear.hessian.matrix()
    others = torch.ones_like(hessian[0], dtype=torch.bool).index_fill_(0, columns, False)
    compensation, schur = eliminate_columns(hessian, columns, others)
    grid = solve(weight[:, others], prepare(schur, args, SOLVER), args, SOLVER).tensor
    assert isinstance(grid, CompressedTensor)
    kept = (weight[:, columns] + (weight[:, others] - grid.dequantize(weight.dtype)) @ compensation).half()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    codes[:, others] = grid.codes
    codes[:, columns] = Grid(grid.scale.float(), torch.full_like(grid.scale, OFFSET).float(), args).quantize(
        kept.float()
    )
    return OutlierColumnsTensor(codes, grid.scale, columns, kept, linear.grid_args, inputs)


def eliminate_columns(hessian: Tensor, columns: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """How 16-bit `columns` compensate the error of the `others` (bool `[in]`): `R` `[others, kept]`, and the Schur complement.

    The minimum over `Q_K` of `tr((W - Q) H (W - Q)^T)` is at `Q_K = W_K + (W - Q)_N R` with `R = H_NK H_KK^-1`. The loss is
    then that of the other columns alone with the Hessian `H_NN - R H_KN` `[others, others]`. Both have the dtype of `hessian`.
    """
    among, across = hessian[columns][:, columns].double(), hessian[others][:, columns].double()
    among.diagonal().add_(SOLVER.damping * among.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    compensation = torch.linalg.solve(among, across.T).T
    schur = hessian[others][:, others].double() - compensation @ across.T
    return compensation.to(hessian.dtype), ((schur + schur.T) / 2).to(hessian.dtype)


def _largest_inputs(config: LLMInt8, block: Block) -> dict[str, tuple[Tensor, Tensor]]:
    """For every linear, the largest input magnitudes of each calibration token and their columns (see `choose_columns`)."""
    assert block.context is not None
    local = block.local()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in local}
    for batch in inputs_seen(block.module, block.context.samples(), list(local), config.tokens):
        for name, x in batch.items():
            count, width = _column_counts(local[name])
            largest = x.abs().topk(min(count + 1, width), dim=1)
            found[name].append((largest.values, largest.indices))
    none = [(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64))]  # experts that no token reached
    return {
        n: (torch.cat([v for v, _ in rows or none]), torch.cat([c for _, c in rows or none]))
        for n, rows in found.items()
    }


def _column_counts(linear: Linear) -> tuple[int, int]:
    """The number of columns that are kept in 16 bits, and the number of all columns."""
    width = linear.weight.shape[1]
    return kept_columns(linear.grid_args, width), width


METHOD = Method(LLMInt8, apply, kinds=frozenset({OUTLIER_COLUMNS}), scheme=SCHEME, presets=PRESETS)

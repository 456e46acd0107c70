"""The drift of a layer's output: residual targets, the statistic itself, and its use in GPTQ."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from lmpress.calibrate.data.token_rows import TokenRows
from lmpress.calibrate.model.architecture import find_linears
from lmpress.calibrate.model.skeleton import build
from lmpress.calibrate.runner import Runner
from lmpress.calibrate.statistics.drift import Drift, residual_targets
from lmpress.compress.formats.source import open_source
from lmpress.compress.methods.quantize.gptq import GPTQ, Order, Prepared, prepare, solve, sweep_columns
from lmpress.compress.solver.loss import layer_loss
from lmpress.errors import UsageError
from lmpress.kernels.tensor.grid import Grid
from lmpress.recipes.scheme import QuantArgs


class Residual(nn.Module):
    """Two linears in a row; the output of the second is added to the stream, and the sum is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.up(x)
        self.stream = x + self.down(self.hidden.relu())
        return self.stream + x.tanh()


def test_the_residual_target_is_the_first_sum_of_an_output() -> None:
    block = Residual()
    with residual_targets(find_linears(block)) as found:
        result = block(torch.randn(2, 3, 4))
    assert found["up"] is block.hidden
    assert found["down"] is block.stream
    assert found["down"] is not result
    assert not any(m._forward_hooks for m in block.modules())


def test_streaming_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    difference, inputs = (torch.randn(30, n, generator=generator, dtype=torch.float64) for n in (5, 7))
    drift = Drift(5, 7, torch.float64)
    for start in range(0, 30, 10):
        drift.update(difference[start : start + 10], inputs[start : start + 10], sequences=2)
    assert torch.allclose(drift.matrix(), 2 / 6 * difference.T @ inputs)


ARGS = QuantArgs(bits=3, group_size=4)


@dataclass
class DriftedLayer:
    """A layer whose inputs have changed from `before` to `inputs`; `best` is the least squares solution for the new inputs."""

    before: Tensor
    inputs: Tensor
    weight: Tensor
    drift: Drift
    best: Tensor

    @classmethod
    def make(cls) -> "DriftedLayer":
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(200, 12, generator=generator, dtype=torch.float64)
        before = inputs + 0.1 * torch.randn(200, 12, generator=generator, dtype=torch.float64)
        weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        drift = Drift(5, 12, torch.float64)
        drift.update((before - inputs) @ weight.T, inputs, sequences=1)
        return cls(before, inputs, weight, drift, torch.linalg.lstsq(inputs, before @ weight.T).solution.T)

    def prepared(self, config: GPTQ) -> Prepared:
        return prepare(2 * self.inputs.T @ self.inputs, ARGS, config)

    def loss(self, weight: Tensor) -> float:
        """The squared error of the layer's output."""
        return float((self.before @ self.weight.T - self.inputs @ weight.T).square().sum())


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_target_is_the_least_squares_solution(share: float) -> None:
    """Without damping, `W + G H^-1` is the weight whose output for `X` is nearest to the original output."""
    layer = DriftedLayer.make()
    prepared = layer.prepared(GPTQ(damping=0.0))
    target = prepared.drift_target(layer.drift, share)
    assert target is not None
    moved = (target.errors.T @ prepared.factor.upper)[:, prepared.order.argsort()]
    assert torch.allclose(moved, share * (layer.best - layer.weight), atol=1e-9)
    target = target.weight(layer.weight, prepared.factor.upper, prepared.order)
    assert torch.allclose(target, layer.weight + share * (layer.best - layer.weight), atol=1e-9)


def test_without_share_or_drift_there_is_no_target() -> None:
    layer = DriftedLayer.make()
    prepared = layer.prepared(GPTQ())
    assert prepared.drift_target(layer.drift, 0.0) is None
    assert prepared.drift_target(None, 1.0) is None


@pytest.mark.parametrize(
    ("order", "groups"),
    [("natural", "static"), ("natural", "dynamic"), ("act", "static"), ("group", "static"), ("group", "dynamic")],
)
def test_the_sweep_approximates_the_target(order: Order, groups: Literal["static", "dynamic"]) -> None:
    """Its errors are those against the least squares solution, and the quantized output is nearer to the original one."""
    layer, config = DriftedLayer.make(), GPTQ(order=order, groups=groups, damping=0.0)
    prepared = layer.prepared(config)
    target = prepared.drift_target(layer.drift, 1.0)
    assert target is not None
    codes, grid, errors = sweep_columns(layer.weight, prepared, ARGS, config, target)
    quantized = grid.dequantize(codes)
    product = (errors.T @ prepared.factor.upper)[:, prepared.order.argsort()]
    assert torch.allclose(layer.best - quantized, product, atol=1e-9)
    plain = solve(layer.weight, prepared, ARGS, config).tensor.dequantize(torch.float64)
    assert layer.loss(quantized) < layer.loss(plain)


def test_the_loss_against_the_target() -> None:
    """The layer's own loss plus `excess` is the loss against the least squares solution."""
    layer = DriftedLayer.make()
    prepared = layer.prepared(GPTQ(damping=0.0))
    target = prepared.drift_target(layer.drift, 1.0)
    assert target is not None
    quantized = Grid.fit(layer.weight, ARGS).dequantize(Grid.fit(layer.weight, ARGS).quantize(layer.weight))
    delta = layer.weight - quantized
    expected = layer_loss(layer.best - quantized, prepared.hessian)
    assert layer_loss(delta, prepared.hessian) + target.excess(delta) == pytest.approx(expected, rel=1e-9)
    gap = layer.loss(quantized) - layer.loss(layer.best)
    assert expected == pytest.approx(gap, rel=1e-9)


def test_zero_drift_changes_nothing() -> None:
    layer, config = DriftedLayer.make(), GPTQ(refine=1, drift=0.5)
    prepared, still = layer.prepared(config), Drift(5, 12, torch.float64)
    target = prepared.drift_target(still, config.drift)
    with_target, without = (solve(layer.weight, prepared, ARGS, config, a).tensor for a in (target, None))
    assert torch.equal(with_target.codes, without.codes)
    assert torch.equal(with_target.scale, without.scale)


def captured(tiny: Path, scratch: Path, ids: Tensor) -> Runner:
    source = open_source(tiny)
    runner = Runner(build(source), source, TokenRows(ids, "test", 10), scratch, reference=True)
    runner.capture()
    return runner


def test_the_drift_is_zero_until_an_earlier_block_changes(tiny: Path, tmp_path: Path) -> None:
    """The statistic of the second block against outputs computed by hand, after the first block was changed."""
    ids = torch.randint(2, 10, (6, 16), generator=torch.Generator().manual_seed(0))
    runner = captured(tiny, tmp_path, ids)
    first = runner.load(0)
    names = set(find_linears(first))
    untouched = runner.collect(0, names)
    assert untouched.drifts.keys() == names
    assert not any(drift.matrix().any() for drift in untouched.drifts.values())
    with torch.no_grad():
        first.get_submodule("mlp.down_proj").weight.mul_(0.5)
    runner.forward(0)
    runner.unload(0)
    second = runner.load(1)
    found = runner.collect(1, names)
    seen: dict[str, list[Tensor]] = {"in": [], "out": []}
    linear = second.get_submodule("self_attn.q_proj")

    def record(module: nn.Module, args: tuple[Tensor], result: Tensor) -> None:
        seen["in"].append(args[0])
        seen["out"].append(result)

    hook = linear.register_forward_hook(record)
    call = runner._calls[1][0]
    with torch.no_grad():
        for stream in (runner._hidden[0], runner._reference[0]):
            result = call.replay(second, stream)
            seen.setdefault("block", []).append(result)
    hook.remove()
    inputs = seen["in"][0].flatten(0, 1)
    difference = (seen["out"][1] - seen["out"][0]).flatten(0, 1)
    assert torch.allclose(found.drifts["self_attn.q_proj"].matrix(), 2 / 6 * difference.T @ inputs, atol=1e-5)
    assert found.drifts["self_attn.q_proj"].matrix().norm() > 0
    # the residual target of the block's last linear is the block's output
    gap = (seen["block"][1] - seen["block"][0]).flatten(0, 1)
    held: list[Tensor] = []
    hook = second.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda module, args: held.append(args[0]))
    with torch.no_grad():
        call.replay(second, runner._hidden[0])
    hook.remove()
    expected = 2 / 6 * gap.T @ held[0].flatten(0, 1)
    assert torch.allclose(found.drifts["mlp.down_proj"].matrix(), expected, atol=1e-5)


def test_groups_by_common_input(tiny: Path, tmp_path: Path) -> None:
    runner = captured(tiny, tmp_path, torch.randint(2, 10, (2, 8), generator=torch.Generator().manual_seed(0)))
    names = set(find_linears(runner.load(0)))
    groups = [sorted(name.rpartition(".")[2] for name in group) for group in runner.groups(0, names)]
    assert groups == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_shares_outside_zero_to_one_are_refused() -> None:
    with pytest.raises(UsageError, match="drift"):
        GPTQ(drift=1.5)
    assert GPTQ().needs == {"hessian"}
    assert GPTQ(drift=0.5).needs == {"hessian", "drift"}


@pytest.mark.parametrize(
    ("bits", "use_target", "expected"), [(3, None, True), (4, None, False), (4, True, True), (3, False, False)]
)
def test_grids_are_fitted_to_the_target_if_coarse_or_requested(
    bits: int, use_target: bool | None, expected: bool
) -> None:
    layer, config = DriftedLayer.make(), GPTQ(damping=0.0, aimed_grid=use_target)
    prepared, args = layer.prepared(config), QuantArgs(bits=bits, group_size=4)
    target = prepared.drift_target(layer.drift, 1.0)
    grid = sweep_columns(layer.weight, prepared, args, config, target)[1]
    wanted = Grid.fit(layer.best if expected else layer.weight, args)
    assert torch.allclose(grid.scale, wanted.scale, atol=1e-9)

"""The choices of GPTQ on held-out tokens, against brute force on these tokens in float64."""

import pytest
import torch
from torch import Tensor, nn

from lmpress.calibrate.statistics.collect import HeldOut
from lmpress.calibrate.statistics.drift import Drift
from lmpress.calibrate.statistics.hessian import Hessian
from lmpress.compress.block import Block, Linear
from lmpress.compress.methods.quantize import gptq
from lmpress.compress.methods.quantize.gptq import DAMPING_FACTORS, GPTQ, prepare, solve
from lmpress.recipes.scheme import QuantArgs

ARGS = QuantArgs(bits=3, group_size=8)
WIDTH, ROWS = 24, 6


class Layer:
    """A layer with main and held-out inputs, and the drift of its output on both."""

    def __init__(self, tokens: int, signal: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        mixing, repair = draw(WIDTH, WIDTH), signal * draw(ROWS, WIDTH)
        self.inputs = [draw(n, WIDTH) @ mixing for n in (tokens, 40)]
        self.difference = [x @ repair.T + draw(len(x), ROWS) for x in self.inputs]
        self.weight = draw(ROWS, WIDTH)
        parts = []
        for x, difference in zip(self.inputs, self.difference, strict=True):
            hessian, drift = Hessian(WIDTH, torch.float64), Drift(ROWS, WIDTH, torch.float64)
            hessian.update(x, sequences=len(x))
            drift.update(difference, x, sequences=len(x))
            parts.append((hessian, drift))
        (hessian, drift), held = parts
        hessian.merge(held[0])
        drift.merge(held[1])
        self.linear = Linear("layer", self.weight.clone(), ARGS, hessian, drift, HeldOut(*held))

    def damped(self, damping: float) -> Tensor:
        """The damped Hessian of the inputs that are not held out."""
        hessian = 2 / len(self.inputs[0]) * self.inputs[0].T @ self.inputs[0]
        return hessian + damping * hessian.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [12, 30, 2000])
def test_the_damping_is_the_best_on_the_held_out_tokens(tokens: int) -> None:
    layer, config = Layer(tokens, 0.0), GPTQ(damping=0.03, refine=1)
    hessian = 2 / tokens * layer.inputs[0].T @ layer.inputs[0]
    losses = {}
    for factor in DAMPING_FACTORS:
        options = GPTQ(damping=0.03 * factor)
        quantized = solve(layer.weight, prepare(hessian, ARGS, options), ARGS, options).tensor.dequantize(torch.float64)
        losses[0.03 * factor] = float(((layer.weight - quantized) @ layer.inputs[1].T).square().sum())
    assert gptq.best_damping(config, [layer.linear]) == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize(("tokens", "signal"), [(30, 0.0), (30, 0.1), (60, 0.3), (4000, 1.0)])
def test_the_share_of_the_drift_is_the_best_on_the_held_out_tokens(tokens: int, signal: float) -> None:
    layer = Layer(tokens, signal)
    drift = 2 / tokens * layer.difference[0].T @ layer.inputs[0]
    correction = drift @ torch.linalg.inv(layer.damped(0.01))
    shares = torch.linspace(0, 1, 10001, dtype=torch.float64)
    left = torch.stack([(layer.difference[1] - s * layer.inputs[1] @ correction.T).square().sum() for s in shares])
    assert gptq.held_out_drift_share(layer.linear, 0.01) == pytest.approx(float(shares[left.argmin()]), abs=1e-4)


def test_noise_gets_a_small_share_and_true_drift_a_large_one() -> None:
    assert gptq.held_out_drift_share(Layer(30, 0.0).linear, 0.01) < 0.2
    assert gptq.held_out_drift_share(Layer(4000, 1.0).linear, 0.01) > 0.95


def test_the_chosen_options_are_reported_and_used() -> None:
    layer, config = Layer(30, 0.3), GPTQ(damping=0.03, drift=0.8, held_out=True)
    gptq.apply(config, Block("block", nn.Identity(), [layer.linear]))
    damping, drift = (layer.linear.figures[name] for name in ("damping", "drift"))
    assert damping == gptq.best_damping(config, [Layer(30, 0.3).linear])
    assert drift == 0.8 * gptq.held_out_drift_share(Layer(30, 0.3).linear, float(damping))
    by_hand = Layer(30, 0.3).linear
    by_hand.held_out = None
    gptq.apply(GPTQ(damping=float(damping), drift=float(drift)), Block("block", nn.Identity(), [by_hand]))
    assert by_hand.result is not None and layer.linear.result is not None
    assert torch.equal(by_hand.result.dequantize(), layer.linear.result.dequantize())


def test_held_out_statistics_are_collected_only_if_used() -> None:
    assert GPTQ().needs == {"hessian"}
    assert GPTQ(drift=0.5, held_out=True).needs == {"hessian", "drift", "held"}

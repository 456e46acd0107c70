"""The streaming Hessian against the batch formula."""

import pytest
import torch

from lmpress.calibrate.statistics import hessian as module
from lmpress.calibrate.statistics.hessian import Hessian


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("chunks", [[7], [1, 2, 4], [5, 2]])
def test_streaming_equals_the_batch_formula(dtype: torch.dtype, chunks: list[int]) -> None:
    x = torch.randn(7, 11, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = Hessian(33, dtype)
    for part in x.split(chunks):
        hessian.update(part.flatten(0, 1).to(dtype), sequences=len(part))
    flat = x.flatten(0, 1)
    expected = 2 / 7 * flat.T @ flat
    assert (hessian.matrix().double() - expected).norm() <= 1e-6 * expected.norm()
    assert torch.allclose(hessian.diagonal().double(), expected.diagonal(), rtol=1e-5)
    assert hessian.tokens == 77


@pytest.mark.parametrize("width", [8, 9, 30])
def test_tiles_cover_the_matrix(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(module, "TILED_WIDTH", 8)
    x = torch.randn(40, width, dtype=torch.float64)
    hessian = Hessian(width, torch.float64)
    hessian.update(x, sequences=1)
    assert torch.allclose(hessian.matrix(), 2 * x.T @ x)
    assert torch.equal(hessian.matrix(), hessian.matrix().T)


def test_half_precision_inputs_are_accumulated_in_float32() -> None:
    x = torch.randn(4096, 16).to(torch.bfloat16)
    hessian = Hessian(16)
    hessian.update(x, sequences=1)
    expected = 2 * x.double().T @ x.double()
    assert (hessian.matrix().double() - expected).norm() <= 1e-5 * expected.norm()


def test_what_is_merged_can_be_taken_out_again() -> None:
    first, second = (
        torch.randn(n, 9, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (30, 20)
    )
    whole, part = Hessian(9, torch.float64), Hessian(9, torch.float64)
    whole.update(first, sequences=3)
    part.update(second, sequences=2)
    whole.merge(part)
    both = torch.cat([first, second])
    assert (whole.tokens, whole.sequences) == (50, 5)
    assert torch.allclose(whole.matrix(), 2 / 5 * both.T @ both)
    assert torch.allclose(part.matrix(), 2 / 2 * second.T @ second)
    assert torch.allclose(whole.without(part), 2 / 3 * first.T @ first)

"""Hadamard matrices of many orders, and rotations of every size."""

import pytest
import torch

from lmpress.compress.methods.transform.hadamard import hadamard, largest_order, random_rotation


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 52, 60, 64, 84, 108, 128, 140, 768])
def test_rows_are_orthogonal_signs(order):
    matrix = hadamard(order)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 92, 1000 + 1])
def test_orders_without_a_construction_are_refused(order):
    with pytest.raises(ValueError, match=str(order)):
        hadamard(order)


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize("size", [1, 7, 12, 63, 64, 80, 172, 320])
def test_rotations_are_orthogonal(size, keep_mean):
    rotation = random_rotation(size, seed=3, keep_mean=keep_mean)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [7, 64, 80])
def test_the_mean_is_kept_on_demand(size):
    ones = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(ones @ random_rotation(size, 0, keep_mean=True), ones, rtol=0, atol=1e-12)


def test_a_size_without_a_matrix_gets_blocks():
    assert largest_order(172) == 4
    assert largest_order(156) == 52
    rotation = random_rotation(172, 0)
    assert (rotation != 0).sum(1).eq(4).all()


def test_rotations_depend_on_the_seed_and_spread_channels_evenly():
    assert torch.equal(random_rotation(64, 1), random_rotation(64, 1))
    assert not torch.equal(random_rotation(64, 1), random_rotation(64, 2))
    assert random_rotation(64, 1).abs().allclose(torch.tensor(1 / 8, dtype=torch.float64))

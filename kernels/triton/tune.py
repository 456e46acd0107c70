"""The search for the fastest tiles on the GPU at hand: only when it is asked for, a handful for each regime."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from triton.runtime.errors import OutOfResources

from . import configs, launch
from .configs import Config
from .product import TritonProduct
from .tuned import Regime, tuned_on

ALIKE = 1e-2  # how far apart, relative to their norm, results of two right tiles may be: rounding to 16 bits and more

Call = Callable[[Tensor], Tensor]


@torch.no_grad()
def tune(
    products: Sequence[TritonProduct],
    inputs: Sequence[int],
    dtype: torch.dtype,
    seconds: Callable[[Sequence[Call], Tensor], float],
) -> dict[Regime, Config]:
    """Find the fastest tile for each number of `inputs` rows of `dtype` and keep it.

    `products` are copies of one, so many that no cache holds them all, and `seconds` is what a call takes of these with
    inputs. What has its tile is not searched again, and products that take none are left out. Raises `Unavailable` where
    nothing can be kept.
    """
    found: dict[Regime, Config] = {}
    product = products[0]
    tiles, kept = product.layout, tuned_on(product.layout.low)
    for m in inputs:
        regime = Regime.of(m, tiles, product.activations, dtype)
        if kept.get(regime) is None and (m <= configs.MOST_ROWS or product.activations != "float"):
            x = torch.randn(m, tiles.columns, generator=torch.Generator().manual_seed(m)).to(tiles.low.device, dtype)
            found[regime] = _fastest(products, x, regime, seconds)
            kept.keep(regime, found[regime])
    return found


def _fastest(
    products: Sequence[TritonProduct], x: Tensor, regime: Regime, seconds: Callable[[Sequence[Call], Tensor], float]
) -> Config:
    """Of the tiles that give what the usual one gives."""
    product = products[0]
    expected, kept, costs = product(x).float(), tuned_on(x), {}
    for config in launch.choices(x, product.layout, product.activations):
        with kept.trying(regime, config), suppress(OutOfResources):  # some GPUs have no room for some tiles
            if (product(x).float() - expected).norm() <= ALIKE * expected.norm():
                costs[config] = seconds(products, x)
    return min(costs, key=costs.__getitem__)

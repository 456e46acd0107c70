"""The search for the fastest tiles on this GPU: it runs only on request and tries a few tiles for each regime."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from triton.runtime.errors import OutOfResources

from . import configs, launch
from .configs import Config
from .product import TritonProduct
from .tuned import Regime, tuned_on

TOLERANCE = 1e-2  # largest difference, relative to the norm, of the results of two correct tiles in 16 bits

Call = Callable[[Tensor], Tensor]


@torch.no_grad()
def tune(
    products: Sequence[TritonProduct],
    inputs: Sequence[int],
    dtype: torch.dtype,
    seconds: Callable[[Sequence[Call], Tensor], float],
) -> dict[Regime, Config]:
    """Find the fastest tile for each number of `inputs` rows of `dtype` and store it.

    `products` are copies of one product, so many that no cache holds them all; `seconds` times one call of them. Regimes whose
    tile is stored already are not searched again, and products that take no tile are left out. Returns the tiles that were
    found. Raises `Unavailable` if the cache folder cannot be used.
    """
    found: dict[Regime, Config] = {}
    product = products[0]
    tiles, stored = product.layout, tuned_on(product.layout.low)
    for m in inputs:
        regime = Regime.of(m, tiles, product.activations, dtype)
        if stored.get(regime) is None and (m <= configs.MOST_ROWS or product.activations != "float"):
            x = torch.randn(m, tiles.columns, generator=torch.Generator().manual_seed(m)).to(tiles.low.device, dtype)
            found[regime] = _fastest(products, x, regime, seconds)
            stored.keep(regime, found[regime])
    return found


def _fastest(
    products: Sequence[TritonProduct], x: Tensor, regime: Regime, seconds: Callable[[Sequence[Call], Tensor], float]
) -> Config:
    """The fastest of the tiles whose result agrees with that of the usual one."""
    product = products[0]
    expected, stored, costs = product(x).float(), tuned_on(x), {}
    for config in launch.choices(x, product.layout, product.activations):
        with stored.trying(regime, config), suppress(OutOfResources):  # some tiles do not fit some GPUs
            if (product(x).float() - expected).norm() <= TOLERANCE * expected.norm():
                costs[config] = seconds(products, x)
    return min(costs, key=costs.__getitem__)

"""Hadamard matrices and rotations made of them: orthogonal, with entries of equal magnitude, so that outliers are spread.

Orders: 2**k (Sylvester), q + 1 for q = 3 mod 4 and 2 (q + 1) for q = 1 mod 4 (Paley; q a prime or its square), and the
products of these with powers of two: among others 12, 20, 28, 36, 40, 52, 60, 108 and 140.
"""

import math

import torch
from torch import Tensor


def random_rotation(size: int, seed: int, keep_mean: bool = False) -> Tensor:
    """An orthogonal float64 matrix `[size, size]`: random signs times a normalised Hadamard matrix.

    If there is no Hadamard matrix of that size, the rotation is block-diagonal with blocks of the largest order that divides
    it. With `keep_mean`, a reflection makes the matrix map the vector of ones to itself, so that the subtraction of the mean
    in a LayerNorm commutes with it. `seed` is that of the signs.
    """
    order = largest_order(size)
    block = hadamard(order) / math.sqrt(order)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    rotation = signs.unsqueeze(1) * torch.block_diag(*[block] * (size // order))
    if not keep_mean:
        return rotation
    ones = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
    axis = ones @ rotation - ones
    length = torch.linalg.vector_norm(axis)
    return rotation if length < 1e-12 else rotation - 2 * torch.outer(rotation @ axis, axis) / length**2


def largest_order(size: int) -> int:
    """The largest divisor of `size` for which `hadamard` can construct a matrix."""
    return max(d for d in range(1, size + 1) if size % d == 0 and _root(d) is not None)


def hadamard(order: int) -> Tensor:
    """A float64 matrix of 1 and -1 with `H H^T = order * I`. Raises `ValueError` if there is no construction for `order`."""
    root = _root(order)
    if root is None:
        raise ValueError(f"no construction of a Hadamard matrix of order {order}")
    matrix = _paley(root) if root > 1 else torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _root(order: int) -> int | None:
    """The order that doubling starts from: 1, or the smallest order of a Paley matrix that leads to `order`; else None."""
    odd = order // (order & -order)
    if odd == 1:
        return 1
    roots = [odd << k for k in range(2, (order // odd).bit_length())]
    return next((root for root in roots if _field_of(root) is not None), None)


def _field_of(order: int) -> tuple[int, bool] | None:
    """The size of the finite field of a Paley matrix of this order, and whether it is construction II; None if neither."""
    if (order - 1) % 4 == 3 and _is_field(order - 1):
        return order - 1, False
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_field(order // 2 - 1):
        return order // 2 - 1, True
    return None


def _is_field(q: int) -> bool:
    root = math.isqrt(q)
    return _is_prime(q) or (root * root == q and _is_prime(root))


def _is_prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, math.isqrt(n) + 1))  # there is no Paley matrix for q = 2


def _paley(order: int) -> Tensor:
    found = _field_of(order)
    assert found is not None
    q, second = found
    jacobsthal = _quadratic_characters(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1 if second else -1, jacobsthal
    eye = torch.eye(q + 1, dtype=torch.float64)
    if not second:
        return eye + core
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, minus)


def _quadratic_characters(q: int) -> Tensor:
    """`chi(a - b)` `[q, q]` over the field of q elements: 1 for squares, -1 for others, 0 for zero.

    If q = p**2, the elements are `a + b sqrt(r)` with r not a square mod p. An element is a square if and only if its norm
    a^2 - r b^2 is a square mod p.
    """
    p = q if _is_prime(q) else math.isqrt(q)
    legendre = torch.full((p,), -1.0, dtype=torch.float64)
    legendre[torch.arange(1, p) ** 2 % p] = 1
    legendre[0] = 0
    numbers = torch.arange(p)
    if p == q:
        return legendre[(numbers.unsqueeze(1) - numbers) % p]
    r = int((legendre == -1).nonzero()[0])
    a, b = torch.meshgrid(numbers, numbers, indexing="ij")
    a, b = a.flatten(), b.flatten()
    first, second = a.unsqueeze(1) - a, b.unsqueeze(1) - b
    return legendre[(first**2 - r * second**2) % p]

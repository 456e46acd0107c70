"""The statistic of second-order methods: the Hessian `H = 2/N * X^T X` of a linear layer's inputs."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

# Below this width, one full product is faster than products that leave out the lower half.
TILED_WIDTH, TILES = 1024, 4
STRIP = 512


class Statistic(ABC):
    """A sum over calibration tokens, in `_sum`; `tokens` and `sequences` count the tokens and calibration rows in it."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.sequences = self.tokens = 0
        self._sum = torch.zeros(rows, columns, dtype=dtype, device=device)

    @abstractmethod
    def matrix(self) -> Tensor:
        """The sum times `2/N` `[rows, columns]`, in the statistic's own memory: do not modify it.

        After the first call nothing can be added.
        """

    def merge(self, other: Self) -> None:
        """Add the tokens of `other`, which is not changed."""
        self._sum += other._sum
        self.sequences += other.sequences
        self.tokens += other.tokens

    def without(self, part: Self) -> Tensor:
        """`matrix()` of all tokens except those of `part`, which must have been merged; a new tensor."""
        whole = self.matrix() * (self.sequences / max(self.sequences - part.sequences, 1))
        return whole.sub_(part.matrix(), alpha=part.sequences / max(self.sequences - part.sequences, 1))


class Hessian(Statistic):
    """Streaming Hessian of the layer objective `1/N * ||X (W - Q)^T||^2` (GPTQ, Frantar et al. 2022, section 3), for N
    calibration rows.

    Linears that read the same tensor share one instance. It is accumulated in `dtype`, float32 or float64.
    """

    def __init__(self, width: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        super().__init__(width, width, dtype, device)
        self.width = width
        self._matrix: Tensor | None = None  # the sum, scaled and mirrored in place on first use

    @classmethod
    def unseen(cls, width: int, dtype: torch.dtype, device: torch.device) -> "Hessian":
        """The identity, for a layer that no calibration token reached. With it every method rounds to nearest."""
        hessian = cls(width, dtype, device)
        hessian._sum.diagonal().fill_(0.5)
        return hessian

    def update(self, inputs: Tensor, sequences: int) -> None:
        """Add the rows of `inputs` `[tokens, width]` (any float dtype) that came from `sequences` calibration rows."""
        assert self._matrix is None
        x = inputs.to(self._sum.dtype)
        for start, stop in self._tiles():  # only the upper tiles: X^T X is symmetric
            self._sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.sequences += sequences
        self.tokens += inputs.shape[0]

    def matrix(self) -> Tensor:
        """`2/N * X^T X` `[width, width]`, exactly symmetric, in the statistic's own memory: do not modify it.

        After the first call nothing can be added.
        """
        if self._matrix is None:
            self._matrix = self._mirrored(self._sum.mul_(2 / max(self.sequences, 1)))
        return self._matrix

    def diagonal(self) -> Tensor:
        """The diagonal of `matrix()` `[width]`."""
        return self._sum.diagonal() * (2 / max(self.sequences, 1)) if self._matrix is None else self._matrix.diagonal()

    def _mirrored(self, matrix: Tensor) -> Tensor:
        """Fill the lower triangle of `matrix` in place, strip by strip: a full transpose would double the memory."""
        for start in range(0, self.width, STRIP):
            strip = matrix[start : start + STRIP, start:]
            strip[:, : len(strip)].copy_(strip[:, : len(strip)].triu() + strip[:, : len(strip)].triu(1).T)
            matrix[start + len(strip) :, start : start + len(strip)] = strip[:, len(strip) :].T
        return matrix

    def _tiles(self) -> list[tuple[int, int]]:
        if self.width < TILED_WIDTH:
            return [(0, self.width)]
        step = -(-self.width // TILES)
        return [(start, min(start + step, self.width)) for start in range(0, self.width, step)]

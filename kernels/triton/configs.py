"""Which tile a product takes, by the number of its input rows: a short table, and the variants that a search tries (`tune.py`).

None of these has been timed on a GPU yet. They follow from what compiles without spills, with wide loads and with matrix
instructions (`tests/kernels/triton/test_machine_code.py` checks that), and from what is known of similar kernels.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..kernel import Activations

MOST_ROWS = 128  # of inputs of an exact product; for more, the weight is dequantized for the vendor's kernel
FEWEST_SLABS = 4  # per program: with fewer, its start and end dominate
HOPPER = 9  # major compute capability


@dataclass(frozen=True)
class Config:
    """Rows of the weight and of the inputs in a tile, warps, stages of the pipeline, programs per multiprocessor."""

    block_n: int
    block_m: int
    warps: int
    stages: int
    programs: int = 4


GEMV = Config(32, 1, 4, 1, programs=8)


def config(m: int, activations: Activations, bits: int, codebook: bool, capability: int) -> Config:
    """The tile for `m` rows of inputs and a weight of `bits` bits, perhaps of a codebook, on GPUs of a major `capability`.

    Operands that are made in registers cannot be copied to where they are used: on Hopper the pipeline would load them 8
    bytes at a time, and on any GPU the entries of a codebook one by one. Many programs hide each other's latency instead.
    """
    as_stored = activations != "float" and bits == 8
    stages = 3 if as_stored or (capability < HOPPER and not codebook) else 1
    if activations != "float" and m > 64:
        return Config(128, 128 if as_stored else 64, 8, stages, programs=1)
    return Config(64, 16 if m <= 16 else 32 if m <= 32 else 64, 4, stages)


def variants(usual: Config) -> list[Config]:
    """The few tiles that a search tries, first `usual` itself: wider and narrower, with and without a pipeline; for products of
    one row, which have no pipeline, with more and fewer programs."""
    if usual.block_m == 1:
        tried = [replace(usual, block_n=n, programs=p) for n in (16, 32, 64) for p in (4, 8)]
    else:
        tried = [replace(usual, block_n=n, stages=s) for n in (32, 64, 128) for s in (1, 3)]
    return list(dict.fromkeys([usual, *tried]))


def splits(tiles: int, slabs: int, programs: int) -> int:
    """How many programs share the columns of one tile, so that all `tiles` together take about `programs`."""
    return max(1, min(programs // tiles, slabs // FEWEST_SLABS))


def processors_of(tensor: Tensor) -> int:
    """The number of multiprocessors of the device of `tensor`; 1 if it is not a GPU (the interpreter)."""
    return _properties(tensor.get_device()).multi_processor_count if tensor.is_cuda else 1


def capability_of(tensor: Tensor) -> int:
    """The major compute capability of the device of `tensor`; that of Hopper if it is not a GPU."""
    return _properties(tensor.get_device()).major if tensor.is_cuda else HOPPER


@cache
def _properties(device: int) -> "torch._C._CudaDeviceProperties":
    return torch.cuda.get_device_properties(device)

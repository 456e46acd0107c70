"""SpQR layers: every kernel against float64 over widths and bits, and no more memory than the checkpoint takes."""

import copy
import random

import pytest
import torch

from lmpress.compress.formats.kinds import bilevel
from lmpress.errors import UsageError
from lmpress.kernels import dispatch
from lmpress.kernels.kernel import KernelSpec
from lmpress.kernels.modules.linear import Serving, SpQRLinear
from lmpress.kernels.tensor import Bilevel, SpQRTensor
from lmpress.recipes.scheme import QuantArgs


def random_tensor(rows: int, columns: int, bits: int, group: int, share: float, seed: int) -> SpQRTensor:
    generator = torch.Generator().manual_seed(seed)
    args = QuantArgs(bits, False, "group", group, "spqr", scale_dtype="bilevel", outliers=share)
    groups = -(-columns // group)
    scale = Bilevel.fit(torch.rand(rows, groups, generator=generator) + 0.1)
    zero = Bilevel.fit(torch.rand(rows, groups, generator=generator) * args.maxq)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    kept = torch.rand(rows, columns, generator=generator) < share
    values = torch.randn(int(kept.sum()), generator=generator).half()
    return SpQRTensor(codes, scale, zero, kept.sum(1), kept.nonzero()[:, 1], values, args)


def parts(tensor: SpQRTensor) -> list[torch.Tensor]:
    levels = [part for level in (tensor.scale, tensor.zero) for part in (level.codes, level.scale, level.zero)]
    return [tensor.codes, *levels, tensor.counts, tensor.columns, tensor.values]


@pytest.mark.parametrize("name", [kernel.name for kernel in dispatch.KERNELS])
@pytest.mark.parametrize("seed", range(12))
def test_random_layers(name: str, seed: int) -> None:
    draw = random.Random(seed)
    rows, columns, batch = draw.randint(1, 70), draw.choice([16, 43, 64, 100, 300]), draw.choice([1, 3, 9, 40])
    tensor = random_tensor(
        rows, columns, draw.randint(2, 8), draw.choice([8, 16, 17, 32]), draw.choice([0, 0.05]), seed
    )
    try:
        module = SpQRLinear(tensor, None, Serving(kernel=name))
    except UsageError as error:
        pytest.skip(str(error))
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed))
    expected = x.double() @ tensor.dequantize(torch.float64).T
    assert float((module(x).double() - expected).norm() / expected.norm()) < 2e-6
    for served in (module.compressed, copy.deepcopy(module).compressed, module.half().float().compressed):
        assert all(torch.equal(*pair) for pair in zip(parts(served), parts(tensor), strict=True))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_memory_holds_what_the_disk_holds() -> None:
    if dispatch.choose(KernelSpec(4, 32, symmetric=False)).kernel.name == "torch-dequantize":
        pytest.skip("no compiled kernels here")
    tensor = random_tensor(256, 1024, 4, 32, 0.01, 0)
    module = SpQRLinear(tensor, None)
    held = {buffer.data_ptr(): buffer.nbytes for buffer in module.buffers()}
    stored = sum(part.nbytes for part in bilevel.pack("layer", tensor).values())
    assert sum(held.values()) < 1.03 * stored  # nibbles for 3-bit codes, row starts in 8 bytes

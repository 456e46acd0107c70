"""Packed states: the formulas in float64, the number of bytes, and every way in which a cache is cut and reordered."""

import math

import pytest
import torch
from torch import Tensor

from lmpress.errors import CompressError
from lmpress.kernels.cache.packed import PackedStates, pack, unpack
from lmpress.recipes.scheme import QuantArgs

BITS = range(2, 9)


def states(tokens: int = 64, heads: int = 3, width: int = 8, rows: int = 2) -> Tensor:
    """Random states with an offset per channel, as keys have."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, heads, tokens, width, generator=generator, dtype=torch.float64)
    return (noise + 5 * torch.randn(1, heads, 1, width, generator=generator, dtype=torch.float64)).float()


def args(bits: int, symmetric: bool, strategy: str, group: int | None) -> QuantArgs:
    formula = "signed" if symmetric else "spqr"
    return QuantArgs(bits, symmetric, strategy, group, formula=formula, dynamic=True)  # type: ignore[arg-type]


def reference(values: list[float], bits: int, symmetric: bool) -> list[float]:
    """One group, number by number in float64; scale and offset are rounded to float16, as they are stored."""

    def half(x: float) -> float:
        return torch.tensor(x, dtype=torch.float64).half().double().item()

    if symmetric:
        scale = half(max(abs(v) for v in values) / (2 ** (bits - 1) - 1))
        return [scale * max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(v / scale))) for v in values]
    low, scale = half(min(values)), half((max(values) - min(values)) / (2**bits - 1))
    return [low + scale * max(0, min(2**bits - 1, round((v - low) / scale))) for v in values]


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_exact_and_as_small_as_it_can_be(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, 3 * bits)
    assert torch.equal(unpack(packed, bits), codes)
    halves = torch.cat([pack(codes[..., :8], bits), pack(codes[..., 8:], bits)], -1)
    assert torch.equal(halves, packed)  # so that a cache can grow at its end


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_keys_share_scales_along_tokens(bits: int, symmetric: bool) -> None:
    given = states()
    found = PackedStates.of(given, args(bits, symmetric, "group", 16), along_tokens=True).states(torch.float32)
    for row, head, channel, start in ((0, 0, 0, 0), (1, 2, 7, 48), (0, 1, 3, 16)):
        group = given[row, head, start : start + 16, channel]
        expected = torch.tensor(reference(group.tolist(), bits, symmetric))
        assert torch.allclose(found[row, head, start : start + 16, channel], expected, atol=2e-5)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize(("strategy", "group"), [("token", None), ("group", 12), ("group", 32)])
def test_values_share_scales_within_a_token(strategy: str, group: int | None, symmetric: bool) -> None:
    """Channels are those of all heads; groups of 32 do not divide 24 channels and are replaced with one scale per token."""
    given = states()
    found = PackedStates.of(given, args(4, symmetric, strategy, group), along_tokens=False).states(torch.float32)
    size = 12 if group == 12 else 24
    for row, token, start in ((0, 0, 0), (1, 63, 24 - size), (0, 31, 0)):
        channels = given[row, :, token].flatten()[start : start + size]
        expected = torch.tensor(reference(channels.tolist(), 4, symmetric))
        assert torch.allclose(found[row, :, token].flatten()[start : start + size], expected, atol=2e-5)


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_at_most_half_a_step(bits: int) -> None:
    given = states()
    found = PackedStates.of(given, args(bits, False, "group", 32), along_tokens=True).states(torch.float32)
    groups = given.unflatten(2, (-1, 32))
    step = (groups.amax(3, keepdim=True) - groups.amin(3, keepdim=True)) / (2**bits - 1)
    stored = groups.abs().amax(3, keepdim=True) * 2**-10 + step * 2**bits * 2**-10  # float16 of offset and scale
    assert ((found.unflatten(2, (-1, 32)) - groups).abs() <= step / 2 + stored).all()


def test_constant_and_zero_states_come_back_exactly() -> None:
    for value in (0.0, 3.0, -0.5):
        given = torch.full((1, 2, 16, 8), value)
        for along in (True, False):
            found = PackedStates.of(given, args(4, False, "group", 8), along_tokens=along)
            assert torch.equal(found.states(torch.float32), given)


def test_states_beyond_float16_are_refused() -> None:
    with pytest.raises(CompressError, match=r"overflows float16; use float32 scales"):
        PackedStates.of(states() + 1e6, args(4, False, "group", 16), along_tokens=True)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_bytes_by_formula(bits: int) -> None:
    rows, heads, tokens, width = 2, 3, 64, 8
    channels = heads * width
    keys = PackedStates.of(states(), args(bits, False, "group", 16), along_tokens=True)
    assert keys.nbytes == rows * channels * (tokens * bits // 8 + tokens // 16 * 2 * 2)
    values = PackedStates.of(states(), args(bits, True, "group", 12), along_tokens=False)
    assert values.nbytes == rows * tokens * (math.ceil(channels * bits / 8) + channels // 12 * 2)


@pytest.mark.parametrize("along", [True, False], ids=["keys", "values"])
def test_appending_truncating_and_selecting(along: bool) -> None:
    kind, given = args(4, False, "group", 8), states(tokens=48)
    whole = PackedStates.of(given, kind, along)
    grown = PackedStates.of(given[:, :, :16], kind, along)
    grown.append(PackedStates.of(given[:, :, 16:], kind, along))
    assert grown.tokens == 48 and torch.equal(grown.states(torch.float32), whole.states(torch.float32))
    grown.truncate(24)
    assert torch.equal(grown.states(torch.float32), whole.states(torch.float32)[:, :, :24])
    grown.select(torch.tensor([1, 1, 0]))
    assert torch.equal(grown.states(torch.float32), whole.states(torch.float32)[[1, 1, 0], :, :24])

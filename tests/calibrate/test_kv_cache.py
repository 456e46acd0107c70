"""Calibrated ranges: per channel or for all, stored in the checkpoint, used at any bits; values outside are clamped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import lmpress
from lmpress.calibrate.kv_cache import calibrate
from lmpress.compress.formats.kv_cache import CACHE_RANGES, read_ranges
from lmpress.errors import CompressError, UsageError
from lmpress.kernels.cache.cache import PackedCache, PackedLayer
from lmpress.kernels.cache.packed import PackedStates
from lmpress.kernels.cache.ranges import KVRanges, attached
from lmpress.recipes.scheme import CacheScheme, QuantArgs, cache_args


def static(bits: int = 4, symmetric: bool = False, observer: str = "minmax") -> QuantArgs:
    formula = "signed" if symmetric else "spqr"
    return QuantArgs(bits, symmetric, "channel", None, formula=formula, observer=observer)  # type: ignore[arg-type]


def scheme(bits: int = 4, window: int = 0) -> CacheScheme:
    return CacheScheme(static(bits), cache_args(bits, "token"), window)


def key_range(block: Any, batches: Any, args: QuantArgs) -> Tensor:
    found = calibrate(block, batches, CacheScheme(args, cache_args(4, "token")))
    assert found.keys is not None and found.values is None
    return found.keys


def random_keys(seed: int = 0) -> Tensor:
    return torch.randn(2, 2, 64, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "mixtral", "phi3"])
def test_ranges_are_those_of_the_cached_states(architecture_free_model: Any, record: Any, name: str) -> None:
    """Compared with a real cache of the whole model; a mask excludes whole rows."""
    model, ids = architecture_free_model(name)
    cache = DynamicCache(config=model.config)
    shared = CacheScheme.shared()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    block, call, hidden = record(model, 1)
    keys, values = (states.transpose(1, 2).flatten(2) for states in (cache.layers[1].keys, cache.layers[1].values))
    for mask in (None, torch.arange(len(ids)).unsqueeze(1).expand(ids.shape) > 3):
        seen = keys.flatten(0, 1) if mask is None else keys[mask]
        found = key_range(block, [(call, hidden, mask)], static())
        torch.testing.assert_close(found, torch.stack([seen.amin(0), seen.amax(0)], 1), rtol=1e-5, atol=1e-6)
        found_keys, found_values = calibrate(block, [(call, hidden, mask)], shared)
        value = values.flatten(0, 1) if mask is None else values[mask]
        for ends, states in ((found_keys, seen), (found_values, value)):
            torch.testing.assert_close(ends, torch.stack([states.min(), states.max()]).view(1, 2), rtol=1e-5, atol=1e-6)


@pytest.fixture
def architecture_free_model(make_model: Any, random_ids: Tensor) -> Any:
    """A model by name, with the ids that `record` calls it on."""
    return lambda name: (make_model(name), random_ids)


def test_ranges_grow_with_every_batch_and_mse_cuts_outliers(make_model: Any, record: Any) -> None:
    block, call, hidden = record(make_model("llama"), 0)
    whole = key_range(block, [(call, hidden, None)], static())
    tripled = [(call, hidden, None), (call, 3 * hidden.roll(1, -1), None)]
    both = key_range(block, tripled, static())
    assert (both[:, 0] <= whole[:, 0]).all() and (both[:, 1] >= whole[:, 1]).all() and not torch.equal(both, whole)
    cut = key_range(block, tripled, static(2, observer="mse"))
    wide = both[:, 1] - both[:, 0]
    assert (cut[:, 1] - cut[:, 0] <= 1.01 * wide).all() and (cut[:, 1] - cut[:, 0] < 0.9 * wide).any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_states_are_rounded_between_the_ends(bits: int, symmetric: bool) -> None:
    states = random_keys()
    channels = states.transpose(2, 3).flatten(1, 2)
    ends = torch.stack([channels.amin((0, 2)), channels.amax((0, 2))], 1)
    packed = PackedStates.within(states, static(bits, symmetric), ends)
    absmax = ends.abs().amax(1)
    step = absmax / (2 ** (bits - 1) - 1) if symmetric else (ends[:, 1] - ends[:, 0]) / (2**bits - 1)
    off = (packed.states(torch.float32) - states).abs().transpose(2, 3).flatten(1, 2).amax((0, 2))
    assert (off <= 0.51 * step + 2e-3).all()
    assert packed.nbytes == states.numel() * bits // 8 + len(ends) * (2 if symmetric else 4)
    beyond = PackedStates.within(10 * states, static(bits, symmetric), ends).states(torch.float32)
    if not symmetric:
        assert (beyond.transpose(2, 3).flatten(1, 2).amax((0, 2)) <= ends[:, 1] * 1.01 + 2e-3).all()


def test_one_scale_for_all_tokens_in_any_order() -> None:
    states = random_keys()
    channels = states.transpose(2, 3).flatten(1, 2)
    ends = torch.stack([channels.amin((0, 2)), channels.amax((0, 2))], 1)
    whole = PackedStates.within(states, static(), ends).states(torch.float32)
    parts = PackedStates.within(states[:, :, :32], static(), ends)
    parts.append(PackedStates.within(states[:, :, 32:], static(), ends))
    assert torch.equal(parts.states(torch.float32), whole)
    parts.truncate(40)
    parts.select(torch.tensor([1, 0, 1]))
    assert torch.equal(parts.states(torch.float32), whole[[1, 0, 1], :, :40])


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_scale_for_all_channels(symmetric: bool) -> None:
    states = random_keys()
    args = QuantArgs(8, symmetric, "tensor", None, formula="signed" if symmetric else "spqr")
    packed = PackedStates.within(states, args, torch.stack([states.min(), states.max()]).view(1, 2))
    step = states.abs().max() / 127 if symmetric else (states.max() - states.min()) / 255
    assert (packed.states(torch.float32) - states).abs().max() <= 0.51 * step + 1e-3
    assert packed.nbytes == states.numel() + (2 if symmetric else 4)
    with pytest.raises(CompressError, match="expected 1 calibrated cache ranges, got 8"):
        PackedStates.within(states, args, torch.zeros(8, 2))


def test_ranges_of_other_channels_are_refused() -> None:
    with pytest.raises(CompressError, match="expected 8 calibrated cache ranges, got 6"):
        PackedStates.within(random_keys(), static(), torch.zeros(6, 2))


def test_a_layer_rounds_states_that_leave_the_window() -> None:
    ends = torch.tensor([[-4.0, 4.0]] * 8)
    layer = PackedLayer(scheme(8, window=8), KVRanges(ends, None))
    states = random_keys()
    keys, _ = layer.update(states, states)
    assert torch.equal(keys, states)  # a prompt attends to its unquantized states
    keys, _ = layer.update(states[:, :, :1], states[:, :, :1])
    assert 0 < (keys[:, :, :32] - states[:, :, :32]).abs().max() <= 8 / 255 * 0.51
    assert torch.equal(keys[:, :, 32:64], states[:, :, 32:])


def compressed(tiny: Path, out: Path, observer: str = "minmax") -> Path:
    recipe = out.parent / "recipe.yaml"
    keys = f"{{bits: 4, symmetric: false, strategy: channel, group_size: null, formula: spqr, observer: {observer}}}"
    values = "{bits: 4, symmetric: false, strategy: token, group_size: null, formula: spqr, dynamic: true}"
    weights = "{bits: 8, strategy: group, group_size: 8}"
    recipe.write_text(
        f"passes: [{{method: rtn, scheme: {{weights: {weights}, kv: {{window: 8, keys: {keys}, values: {values}}}}}}}]\n"
        f"calibration: {{data: '{out.parent / 'text.txt'}', samples: 4, seq_len: 32}}\n"
    )
    letters = torch.randint(0, 8, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    (out.parent / "text.txt").write_text("".join("abcdefgh"[i] for i in letters))
    lmpress.run(tiny, out, recipe)
    return out


def test_a_checkpoint_contains_its_ranges(tiny: Path, tmp_path: Path) -> None:
    out = compressed(tiny, tmp_path / "out")
    model = lmpress.load(out)
    ranges = attached(model)
    assert [tuple(ends.keys.shape) for ends in ranges] == [(16, 2)] * 2 and all(ends.values is None for ends in ranges)
    assert all((ends.keys[:, 0] < ends.keys[:, 1]).all() for ends in ranges)
    cache = model(input_ids=torch.arange(2, 10).repeat(1, 5)).past_key_values
    assert isinstance(cache, PackedCache) and all(
        torch.equal(x.ends.keys, e.keys) for x, e in zip(cache.layers, ranges, strict=True)
    )
    other = lmpress.load(out, kv_bits=8, kv_window=0)(input_ids=torch.arange(2, 10).repeat(1, 5)).past_key_values
    assert other.layers[0].scheme == scheme(8) and torch.equal(other.layers[0].ends.keys, ranges[0].keys)
    assert type(lmpress.load(out, kv_bits=16)(input_ids=torch.tensor([[2]])).past_key_values) is DynamicCache


def test_evaluation_uses_the_static_cache(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    out = compressed(tiny, tmp_path / "out", observer="mse")
    text, options = str(tmp_path / "text.txt"), {"seq_len": 96, "rows": 3, "kv_window": 0}
    kl = [lmpress.evaluate(out, text, kv_bits=bits, **options) for bits in (8, 4, 2)]
    assert "static keys" in kl[0].protocol
    assert 0 < (kl[0].kl or 0) < (kl[1].kl or 0) < (kl[2].kl or 0)


def test_a_checkpoint_without_its_ranges_is_an_error(tiny: Path, tmp_path: Path) -> None:
    out = compressed(tiny, tmp_path / "out")
    ranges = out / CACHE_RANGES
    assert len(read_ranges(ranges)) == 2
    ranges.unlink()
    with pytest.raises(CompressError, match=r"cache_ranges.lmpress is missing.*kv_bits=16"):
        lmpress.load(out)
    assert lmpress.load(out, kv_bits=16)


def test_a_model_without_ranges_is_an_error(make_model: Any) -> None:
    model = make_model("llama")
    with pytest.raises(UsageError, match="calibrated ranges"):
        PackedCache.of(model, scheme())
    with pytest.raises(UsageError, match="a KV cache with static scales needs the ranges of 2 layers"):
        PackedCache(model.config, scheme())


def test_values_have_no_static_scales_per_channel() -> None:
    with pytest.raises(UsageError, match="use strategy tensor, token or group"):
        CacheScheme(static(), static())
    with pytest.raises(UsageError, match="not known in advance"):
        CacheScheme(QuantArgs(4, False, "token", None, formula="spqr"), cache_args(4, "token"))

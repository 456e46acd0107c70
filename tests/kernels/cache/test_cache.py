"""The packed cache in models: what every token reads, generation of every kind, reordering, and refused models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import lmpress
from lmpress.errors import UsageError
from lmpress.kernels.cache.cache import PackedCache, PackedLayer, serve_cache
from lmpress.recipes.scheme import CacheScheme, cache_args

SMALL = CacheScheme(cache_args(4, "group", 8), cache_args(4, "token"), window=8)
LENGTH = 30


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 31, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_parts(model: PreTrainedModel, ids: Tensor, scheme: CacheScheme, sizes: list[int]) -> tuple[Tensor, PackedCache]:
    """The logits if the tokens are added in passes of these sizes, and the cache after them."""
    cache = PackedCache(model.config, scheme)
    parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(sizes, 1)]
    return torch.cat(parts, 1), cache


def states(layer: Any) -> tuple[Tensor, Tensor]:
    """All states of the layer, as attention reads them."""
    past = layer._unpacked(torch.float32)
    if past is None:
        return layer.keys, layer.values
    return torch.cat([past[0], layer.keys], 2), torch.cat([past[1], layer.values], 2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "mixtral", "phi3"])
def test_inside_the_window_the_cache_is_exact(make_model: Any, ids: Tensor, name: str) -> None:
    """Grouped and single key-value heads, learned, rotary and alibi positions; no token is packed before `window + step`."""
    model = make_model(name)
    model.config.sliding_window = None
    full = CacheScheme(SMALL.keys, SMALL.values, window=LENGTH - 8)
    logits, cache = by_parts(model, ids, full, [1] * LENGTH)
    with torch.no_grad():
        plain = DynamicCache(config=model.config)
        expected = torch.cat(
            [model(input_ids=i, past_key_values=plain, use_cache=True).logits for i in ids.split(1, 1)], 1
        )
    assert torch.equal(logits, expected)
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)
    assert cache.get_seq_length() == LENGTH and cache.dense_nbytes == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in plain.layers
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("window", [0, 8])
def test_what_a_token_reads_does_not_depend_on_the_passes(make_model: Any, ids: Tensor, bits: int, window: int) -> None:
    """One token per pass, or passes that begin at the tokens that are packed: the same predictions."""
    model, scheme = make_model("llama"), CacheScheme(cache_args(bits, "group", 8), cache_args(bits, "token"), window)
    single, one = by_parts(model, ids, scheme, [1] * LENGTH)
    first = window + 8
    steps, other = by_parts(model, ids, scheme, [first, *[8] * ((LENGTH - first) // 8), (LENGTH - first) % 8])
    assert torch.allclose(single, steps, atol=1e-3 if bits == 8 else 1e-4)
    assert one.nbytes == other.nbytes < one.dense_nbytes
    with torch.no_grad():
        assert not torch.allclose(single, model(input_ids=ids).logits, atol=1e-5)


def test_attention_reads_the_packed_past_and_the_exact_window() -> None:
    """After every token, tokens before the last whole step outside the window are rounded, and all others are exact."""
    layer = PackedLayer(SMALL)
    given = torch.randn(2, 2, 2, LENGTH, 8, generator=torch.Generator().manual_seed(1))  # keys and values
    for t in range(LENGTH):
        keys, values = layer.update(given[0, :, :, t : t + 1], given[1, :, :, t : t + 1])
        rounded = max(0, t - 8) // 8 * 8
        for read, original in ((keys, given[0]), (values, given[1])):
            assert read.shape[2] == t + 1
            assert torch.equal(read[:, :, rounded:], original[:, :, rounded : t + 1])
            off = (read[:, :, :rounded] - original[:, :, :rounded]).abs()
            assert off.numel() == 0 or 0 < off.max() < 0.3


def test_a_prompt_attends_to_itself_in_full_precision(make_model: Any, ids: Tensor) -> None:
    model = make_model("llama")
    logits, cache = by_parts(model, ids, SMALL, [LENGTH])
    with torch.no_grad():
        assert torch.equal(logits, model(input_ids=ids).logits)
    assert cache.layers[0]._packed_tokens == SMALL.packed(LENGTH) == 16


@pytest.mark.parametrize(("bits", "smaller"), [(8, 0.5), (4, 0.3)])
def test_the_memory_follows_the_formula(make_model: Any, bits: int, smaller: float) -> None:
    """Two layers, 2 key-value heads of 8 channels, float32 states; 8 tokens of a channel or 16 channels share 2 x float16."""
    scheme = CacheScheme(cache_args(bits, "group", 8), cache_args(bits, "token"), window=8)
    many = torch.randint(3, 31, (3, 31), generator=torch.Generator().manual_seed(0))
    _, cache = by_parts(make_model("llama"), many, scheme, [31])
    packed, channels = (31 - 8) // 8 * 8, 16
    keys = packed * channels * bits // 8 + packed // 8 * channels * 4
    values = packed * channels * bits // 8 + packed * 4
    window = (31 - packed) * channels * 4 * 2
    assert cache.nbytes == 2 * 3 * (keys + values + window)
    assert cache.dense_nbytes == 2 * 3 * 31 * channels * 4 * 2
    assert keys + values < smaller * packed * channels * 4 * 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": True, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "beams", "samples", "penalty"],
)
def test_generation_uses_it(make_model: Any, ids: Tensor, options: dict[str, Any]) -> None:
    """At 8 bits, a batch with padding on the left generates the same tokens as with the full cache."""
    prompt, mask = ids[:, :12], torch.ones(2, 12, dtype=torch.long)
    prompt[1, :5], mask[1, :5] = 0, 0
    given = {"attention_mask": mask, "max_new_tokens": 16, "pad_token_id": 0, "eos_token_id": None, **options}
    model = make_model("llama")
    torch.manual_seed(0)
    expected = model.generate(prompt, **given)
    serve_cache(model, CacheScheme(cache_args(8, "group", 8), cache_args(8, "token"), window=8))
    torch.manual_seed(0)
    found = model.generate(prompt, return_dict_in_generate=True, **given)
    assert type(found.past_key_values) is PackedCache
    assert found.past_key_values.layers[0]._packed_tokens == 16
    assert torch.equal(found.sequences, expected)


def test_a_cache_that_the_caller_passes_is_used(make_model: Any, ids: Tensor) -> None:
    model = make_model("llama")
    serve_cache(model, SMALL)
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :4], past_key_values=PackedCache(model.config, SMALL))
        assert type(model(input_ids=ids).past_key_values) is PackedCache
        assert model(input_ids=ids, use_cache=False).past_key_values is None
        own.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
        own.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 1)
        assert model(input_ids=ids[:, :4], past_key_values=own).past_key_values is own


def test_rows_are_selected_repeated_and_reordered(make_model: Any, ids: Tensor) -> None:
    model = make_model("llama")
    order = torch.tensor([1, 0, 1])
    for change in ("reorder_cache", "batch_select_indices"):
        cache = by_parts(model, ids, SMALL, [LENGTH])[1]
        before = [states(layer) for layer in cache.layers]
        getattr(cache, change)(order)
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(states(layer)[0], keys[order]) and torch.equal(states(layer)[1], values[order])
    cache = by_parts(model, ids, SMALL, [LENGTH])[1]
    keys = states(cache.layers[0])[0]
    cache.batch_repeat_interleave(2)
    assert torch.equal(states(cache.layers[0])[0], keys[[0, 0, 1, 1]])


@pytest.mark.parametrize("removed", [1, 14, 15, 20, 30, 99])
def test_cutting_the_end(make_model: Any, ids: Tensor, removed: int) -> None:
    """30 tokens, 16 of them packed in two steps: inside the window, at its edge, into a step, everything."""
    cache = by_parts(make_model("llama"), ids, SMALL, [LENGTH])[1]
    keys, values = states(cache.layers[1])
    cache.crop(-removed)
    left = max(0, LENGTH - removed)
    assert cache.get_seq_length() == left
    assert torch.equal(states(cache.layers[1])[0], keys[:, :, :left])
    assert torch.equal(states(cache.layers[1])[1], values[:, :, :left])


def test_after_a_reset_it_is_as_new(make_model: Any, ids: Tensor) -> None:
    model = make_model("llama")
    expected, cache = by_parts(model, ids, SMALL, [1] * LENGTH)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    with torch.no_grad():
        again = [model(input_ids=i, past_key_values=cache, use_cache=True).logits for i in ids.split(1, 1)]
    assert torch.equal(torch.cat(again, 1), expected)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("mistral", {"sliding_window": 8}),
        ("gemma2", {"sliding_window": 8, "head_dim": 8}),
        ("mamba", {"state_size": 4}),
    ],
)
def test_models_with_other_caches_are_refused(kind: str, shape: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=2, vocab_size=31, **shape)
    with pytest.raises(
        UsageError,
        match=rf"the KV cache of {kind} cannot be packed: layer \d is a .*; leave its cache in full precision",
    ):
        PackedCache(config, SMALL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheScheme.of(1), "bits 1 is outside"),
        (lambda: CacheScheme.of(9), "bits 9 is outside"),
        (lambda: CacheScheme.of(8, -1), "a window of -1"),
        (
            lambda: CacheScheme(keys=cache_args(8, "channel")),
            "no dynamic scales per channel: there are ever more tokens",
        ),
        (lambda: CacheScheme(values=cache_args(8, "tensor")), "no dynamic scales per tensor"),
        (lambda: CacheScheme(keys=cache_args(8, "group", 12)), "groups of 12 tokens do not fill bytes"),
    ],
)
def test_schemes_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_load_takes_bits_and_window(tiny: Path) -> None:
    ids = torch.randint(2, 10, (1, 20), generator=torch.Generator().manual_seed(0))
    for options, window in (({"kv_bits": 4, "kv_window": 8}, 8), ({"kv_bits": 8}, 64)):
        cache = lmpress.load(tiny, **options)(input_ids=ids).past_key_values
        assert cache.layers[0].scheme == CacheScheme.of(options["kv_bits"], window)
    assert type(lmpress.load(tiny)(input_ids=ids).past_key_values) is DynamicCache
    with pytest.raises(UsageError, match="--kv-window needs a packed cache"):
        lmpress.load(tiny, kv_window=8)


def test_a_recipe_carries_the_scheme_into_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    weights = {"bits": 8, "strategy": "channel", "group_size": None}
    (tmp_path / "recipe.yaml").write_text(
        f"passes: [{{method: rtn, scheme: {{weights: {weights}, kv: {{window: 16, keys: {{bits: 4, symmetric: false, "
        "strategy: group, group_size: 8, formula: spqr, dynamic: true}}}}]".replace("None", "null")
    )
    lmpress.run(tiny, tmp_path / "out", tmp_path / "recipe.yaml")
    assert "kv=4/8 bits, window 16" in (tmp_path / "out/README.md").read_text()
    scheme = CacheScheme(keys=cache_args(4, "group", 8), window=16)
    ids = torch.tensor([[1, 2, 3]])
    assert lmpress.load(tmp_path / "out")(input_ids=ids).past_key_values.layers[0].scheme == scheme
    assert type(lmpress.load(tmp_path / "out", kv_bits=16)(input_ids=ids).past_key_values) is DynamicCache
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(elsewhere(input_ids=ids).past_key_values) is DynamicCache


def test_a_recipe_for_a_model_that_cannot_have_it_is_refused_before_any_work(
    make_model: Any, tmp_path: Path, letters: Any
) -> None:
    make_model("gemma2").save_pretrained(tmp_path / "model")
    letters.save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("passes: [{method: rtn, scheme: {kv: {window: 16}}}]")
    with pytest.raises(UsageError, match=r"layer \d is a DynamicSlidingWindowLayer"):
        lmpress.run(tmp_path / "model", tmp_path / "out", tmp_path / "recipe.yaml")
    assert not (tmp_path / "out").exists()

"""The block-by-block run against the whole model: hidden states, calls, Hessians."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmpress.calibrate import activation_store
from lmpress.calibrate import runner as module
from lmpress.calibrate.activation_store import ActivationStore
from lmpress.calibrate.data.token_rows import TokenRows
from lmpress.calibrate.model.architecture import find_blocks, find_linears
from lmpress.calibrate.model.skeleton import build
from lmpress.calibrate.runner import Runner
from lmpress.compress.formats.source import open_source
from lmpress.errors import CompressError

VOCABULARY, LENGTH = 40, 24
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 8}

# Architecture -> options of its config and the name of its blocks.
MODELS: dict[str, tuple[dict[str, object], str]] = {
    "llama": (GROUPED, "model.layers"),
    "gpt2": ({"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}, "transformer.h"),
    "qwen2": (
        {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "layer_types": LAYERS},
        "model.layers",
    ),
    "mistral": ({**GROUPED, "sliding_window": 5}, "model.layers"),
    "opt": (
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        "model.decoder.layers",
    ),
    "gpt_neox": (WIDTHS, "gpt_neox.layers"),
    "bloom": ({"hidden_size": 32, "n_layer": 3, "n_head": 4}, "transformer.h"),
    "gemma2": ({**GROUPED, "sliding_window": 5, "layer_types": LAYERS}, "model.layers"),
    "gemma3_text": ({**GROUPED, "sliding_window": 5, "layer_types": LAYERS}, "model.layers"),
    "phi3": ({**GROUPED, "pad_token_id": 0, "sliding_window": 5}, "model.layers"),
    "mixtral": ({**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, "model.layers"),
}


@pytest.fixture(params=list(MODELS))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def saved(folder: Path, architecture: str) -> PreTrainedModel:
    """A random model of that kind, float32, saved to `folder`."""
    options = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "max_position_embeddings": 64} | MODELS[
        architecture
    ][0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **options)).eval()
        for parameter in model.parameters():  # norms and biases too
            parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model


def rows(mask: Tensor | None = None, count: int = 6) -> TokenRows:
    ids = torch.randint(2, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return TokenRows(ids, "random", VOCABULARY, mask)


def padding() -> Tensor:
    """The mask of real tokens: rows are padded on the right by 0, 1, 2, ... positions."""
    return torch.arange(LENGTH).expand(6, -1) < LENGTH - torch.arange(6).unsqueeze(1)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows per batch, so that several batches are replayed."""
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 2 * LENGTH)


def opened(folder: Path, token_rows: TokenRows, scratch: Path) -> Runner:
    source = open_source(folder)
    runner = Runner(build(source), source, token_rows, scratch)
    runner.capture()
    return runner


def hidden(runner: Runner) -> Tensor:
    return torch.cat([runner._hidden[i] for i in range(len(runner._hidden))])


@torch.no_grad()
def inputs_of(model: PreTrainedModel, token_rows: TokenRows) -> dict[str, Tensor]:
    """The inputs of every linear `[tokens, width]`, without padding, when the whole model runs on all rows."""
    seen: dict[str, Tensor] = {}
    keep = torch.ones_like(token_rows.ids, dtype=torch.bool) if token_rows.mask is None else token_rows.mask
    hooks = [
        linear.register_forward_pre_hook(lambda m, a, name=name: seen.update({name: a[0].flatten(0, -2)[keep.flatten()]}))
        for name, linear in find_linears(find_blocks(model)[1]).items()
    ]  # fmt: skip
    model(input_ids=token_rows.ids, attention_mask=token_rows.mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_by_structure(name: str, tmp_path: Path) -> None:
    prefix, blocks = find_blocks(saved(tmp_path, name))
    assert (prefix, len(blocks)) == (MODELS[name][1], 3)


@pytest.mark.usefixtures("small_batches")
def test_hidden_states_are_those_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    """Every block gets its own kind of mask: a wrong one would change the result, with windows of 5 in rows of 24."""
    model, token_rows = saved(tmp_path, architecture), rows()
    with torch.no_grad():
        states = model(input_ids=token_rows.ids, output_hidden_states=True, use_cache=False).hidden_states
    runner = opened(tmp_path, token_rows, tmp_path)
    assert len(states) == len(runner.blocks) + 1
    for index in range(len(runner.blocks)):
        assert torch.allclose(hidden(runner), states[index], atol=1e-5), f"before block {index}"
        runner.load(index)
        runner.forward(index)
        runner.unload(index)
        assert all(p.is_meta for p in runner.model.parameters())
    assert not torch.allclose(states[0], states[1], atol=1e-2)


def test_the_window_matters(tmp_path: Path) -> None:
    """A check of the test above: the same weights without windows give different hidden states."""
    for architecture in ("qwen2", "mistral", "gemma2", "gemma3_text", "phi3"):
        model, token_rows = saved(tmp_path / architecture, architecture), rows()
        opened_wide = AutoModelForCausalLM.from_pretrained(tmp_path / architecture, sliding_window=1000).eval()
        with torch.no_grad():
            narrow, wide = (m.base_model(token_rows.ids, use_cache=False)[0] for m in (model, opened_wide))
        assert (narrow - wide).abs().max() > 1e-2, architecture


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("architecture", [name for name in MODELS if name != "mixtral"])  # its experts have no hooks
def test_hessians_are_those_of_hooks_on_the_whole_model(architecture: str, padded: bool, tmp_path: Path) -> None:
    token_rows = rows(padding() if padded else None)
    inputs = inputs_of(saved(tmp_path, architecture), token_rows)
    runner = opened(tmp_path, token_rows, tmp_path)
    for index in range(len(runner.blocks)):
        runner.load(index)
        names = set(find_linears(runner.blocks[index]))
        statistics = runner.collect(index, names, torch.float64)
        assert statistics.hessians.keys() == names
        for name in names:
            x = inputs[f"{index}.{name}"].double()
            expected = 2 / len(token_rows.ids) * x.T @ x
            found = statistics.hessians[name]
            assert (found.matrix() - expected).norm() <= 1e-4 * expected.norm(), f"{index}.{name}"
            assert found.tokens == token_rows.tokens and found.sequences == len(token_rows.ids)
        runner.forward(index)
        runner.unload(index)


@pytest.mark.parametrize(
    ("architecture", "groups"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("qwen2", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("gpt2", [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}]),
        ("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]),
    ],
    ids=["llama", "qwen2", "gpt2", "phi3"],
)
def test_linears_of_one_input_share_one_hessian(architecture: str, groups: list[set[str]], tmp_path: Path) -> None:
    saved(tmp_path, architecture)
    runner = opened(tmp_path, rows(), tmp_path)
    runner.load(0)
    statistics = runner.collect(0, set(find_linears(runner.blocks[0])))
    assert [{name.rpartition(".")[2] for name in group} for group in statistics.groups] == groups
    assert len({id(hessian) for hessian in statistics.hessians.values()}) == 4


def test_only_the_requested_linears_are_collected(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    runner = opened(tmp_path, rows(), tmp_path)
    runner.load(0)
    assert runner.collect(0, {"mlp.down_proj"}).hessians.keys() == {"mlp.down_proj"}


def test_the_content_of_padding_does_not_matter(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    found = []
    for filler in (0, 7):
        token_rows = rows(padding())
        token_rows.ids[~padding()] = filler
        runner = opened(tmp_path, token_rows, tmp_path)
        runner.load(0)
        found.append(runner.collect(0, {"mlp.down_proj"}).hessians["mlp.down_proj"].matrix())
    assert torch.allclose(*found, rtol=1e-5)


def test_collect_and_forward_use_changed_weights(tmp_path: Path) -> None:
    """The basis of true-sequential quantization and of passing on compressed outputs."""
    model, token_rows = saved(tmp_path, "llama"), rows()
    runner = opened(tmp_path, token_rows, tmp_path)
    block = runner.load(0)
    before = runner.collect(0, {"mlp.down_proj"}).hessians["mlp.down_proj"].matrix()
    block.get_parameter("self_attn.q_proj.weight").data.zero_()
    after = runner.collect(0, {"mlp.down_proj"}).hessians["mlp.down_proj"].matrix()
    find_blocks(model)[1][0].get_parameter("self_attn.q_proj.weight").data.zero_()
    x = inputs_of(model, token_rows)["0.mlp.down_proj"].double()
    assert torch.allclose(after.double(), 2 / len(token_rows.ids) * x.T @ x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, rtol=1e-3)
    runner.forward(0)
    with torch.no_grad():
        states = model(input_ids=token_rows.ids, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.allclose(hidden(runner), states[1], atol=1e-5)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("budget", [0, 2 * LENGTH * 32 * 4])
def test_spilling_to_disk_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budget: int) -> None:
    saved(tmp_path / "model", "llama")
    results = []
    for allowed in (activation_store.IN_MEMORY_BYTES, budget):
        monkeypatch.setattr(ActivationStore.__init__, "__defaults__", (allowed,))
        runner = opened(tmp_path / "model", rows(), tmp_path)
        runner.load(0)
        runner.forward(0)
        results.append((hidden(runner), runner.collect(0, {"mlp.down_proj"}).hessians["mlp.down_proj"].matrix()))
    assert len(list(tmp_path.glob("*.bin"))) == (3 if budget == 0 else 2)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_equal_calls_are_kept_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", LENGTH)
    saved(tmp_path, "llama")
    runner = opened(tmp_path, rows(), tmp_path)
    assert all(len(calls) == 6 and len({id(call) for call in calls}) == 1 for calls in runner._calls)
    runner = opened(tmp_path, rows(padding()), tmp_path)
    assert all(len({id(call) for call in calls}) > 1 for calls in runner._calls)


def test_the_recorders_are_gone_after_the_capture(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    runner = opened(tmp_path, rows(), tmp_path)
    assert all("forward" not in vars(block) for block in runner.blocks)


def test_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = saved(tmp_path, "llama")
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data.fill_(3e30)
    model.save_pretrained(tmp_path)
    runner = opened(tmp_path, rows(), tmp_path)
    runner.load(0)
    with pytest.raises(CompressError, match=r"the inputs of model\.layers\.0\.mlp\.down_proj are not finite"):
        runner.collect(0, {"mlp.down_proj"})


def test_a_padding_mask_does_not_apply_to_routed_tokens(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    runner = opened(tmp_path, rows(padding()), tmp_path)
    runner.load(0)
    with pytest.raises(CompressError, match=r"routed tokens, to which a padding mask of .* does not apply"):
        runner.collect(0, set(find_linears(runner.blocks[0])))


def test_held_out_batches_are_also_in_the_main_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main statistics include all rows; those of the held-out batches are also returned on their own."""
    saved(tmp_path / "model", "llama")
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 1)
    monkeypatch.setattr(module, "HELD_OUT", 3)
    runner = opened(tmp_path / "model", rows(), tmp_path)
    names = set(find_linears(runner.load(0)))
    plain = runner.collect(0, names)
    both = runner.collect(0, names, hold_out=True)
    assert both.held_out.keys() == names
    assert not plain.held_out
    for name in names:
        assert torch.allclose(both.hessians[name].matrix(), plain.hessians[name].matrix(), rtol=1e-4, atol=1e-5)
        assert both.held_out[name].hessian.sequences == 2
    ids = rows().ids
    runner = opened(tmp_path / "model", TokenRows(ids[[2, 5]], "test", 10), tmp_path / "two")
    runner.load(0)
    alone = runner.collect(0, names)
    for name in names:
        assert torch.allclose(both.held_out[name].hessian.matrix(), alone.hessians[name].matrix(), rtol=1e-4, atol=1e-5)


def test_one_batch_cannot_be_held_out(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llama")
    runner = opened(tmp_path / "model", rows(), tmp_path)
    names = set(find_linears(runner.load(0)))
    assert not runner.collect(0, names, hold_out=True).held_out


def test_tokens_that_the_model_lacks_are_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    source = open_source(tiny)
    Runner(build(source), source, TokenRows(torch.tensor([[1, 9]]), "test", 11), tmp_path)
    with pytest.raises(
        CompressError, match="the tokenizer returns the token 10, and the model's vocabulary has 10 entries"
    ):
        Runner(build(source), source, TokenRows(torch.tensor([[1, 10]]), "test", 11), tmp_path)

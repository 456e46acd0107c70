"""Hidden size pruning: the selection against brute force, models that load anywhere and compute what was intended."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lmpress
from lmpress.calibrate.data.token_rows import TokenRows
from lmpress.compress.solver.channel_pruning import channels_to_remove, refit_gain, shared_channels_to_remove
from lmpress.compress.solver.damped_hessian import damp
from lmpress.compress.structured.hidden_size import prune_hidden_size
from lmpress.errors import UsageError

BASE: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
}
IDS = torch.randint(3, 31, (40, 12), generator=torch.Generator().manual_seed(0))
ROWS = TokenRows(IDS, "random", 31)


def problem(seed: int, rows: int = 5, columns: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(100, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), 2 * x.T @ x / len(x)


def relative_loss(weight: Tensor, matrix: Tensor, gone: list[int], fixed: bool) -> float:
    """Brute force: the loss of a reader's output, with or without least squares on its other columns."""
    kept = [c for c in range(len(matrix)) if c not in gone]
    answer = torch.zeros_like(weight)
    answer[:, kept] = weight[:, kept] if fixed else torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ weight.T).T
    off = weight - answer
    return float((off @ matrix * off).sum() / (weight @ matrix * weight).sum())


def test_the_shared_selection_is_greedy_and_exact() -> None:
    free, fixed = [problem(seed) for seed in range(3)], [problem(seed) for seed in (3, 4)]
    solved = [(weight, damp(matrix, 0.01)) for weight, matrix in free]
    gone: list[int] = []
    for _ in range(3):
        losses = {}
        for channel in [c for c in range(7) if c not in gone]:
            trial = [*gone, channel]
            losses[channel] = sum(relative_loss(w, h.matrix, trial, fixed=False) for w, h in solved)
            losses[channel] += sum(relative_loss(w, h, trial, fixed=True) for w, h in fixed)
        gone.append(min(losses, key=lambda c: losses[c]))
    found = shared_channels_to_remove([(w.T @ w, h) for w, h in solved], [w.T @ w * h for w, h in fixed], 3)
    assert found.nonzero().flatten().tolist() == sorted(gone)


def test_the_selection_for_one_reader_is_its_own() -> None:
    weight, matrix = problem(0)
    solved = damp(matrix, 0.01)
    alone = channels_to_remove(weight, solved, 1, 4)
    assert torch.equal(shared_channels_to_remove([(weight.T @ weight, solved)], [], 4), alone)


def test_the_gain_is_the_least_squares_one() -> None:
    weight, matrix = problem(1, rows=20)
    gone = torch.tensor([False, True, False, False, True, False, False])

    def loss(gain: Tensor) -> float:
        off = weight.clone()
        off[:, ~gone] -= weight[:, ~gone] * gain
        return float((off @ matrix * off).sum())

    found = refit_gain(matrix, weight, gone)
    assert loss(found) < loss(torch.ones(5, dtype=torch.float64))
    design = (torch.linalg.cholesky(matrix).T.unsqueeze(1) * weight).flatten(0, 1)  # [in * out, in]
    exact = torch.linalg.lstsq(design[:, ~gone], design.sum(1)).solution
    assert loss(exact) <= loss(found) <= 1.02 * loss(exact)


def saved(family: str, folder: Path, **shape: Any) -> Path:
    kind, own = FAMILIES.get(family, (family, {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(BASE | own | shape)), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_hidden_size(family: str, tmp_path: Path, loaded, logits) -> None:
    folder = saved(family, tmp_path / "model")
    prune_hidden_size(folder, tmp_path / "refitted", 24, ROWS)
    prune_hidden_size(folder, tmp_path / "plain", 24, ROWS, refit=False)
    original, refitted, plain = (loaded(tmp_path / name) for name in ("model", "refitted", "plain"))
    assert refitted.config.hidden_size == 24 and refitted.config.head_dim == 8
    assert refitted.config.tie_word_embeddings == original.config.tie_word_embeddings
    assert refitted.get_input_embeddings().weight.shape == (31, 24)
    errors = [float((logits(model, IDS) - logits(original, IDS)).square().mean()) for model in (refitted, plain)]
    assert errors[0] < errors[1] < float(logits(original, IDS).var())
    prompt = IDS[:1, :5]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with_cache = refitted.generate(prompt, use_cache=True, **options)
    assert torch.equal(with_cache, refitted.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_stream_in_a_subspace_loses_nothing(tied: bool, tmp_path: Path, loaded, logits) -> None:
    """Eight channels that are always zero: the output does not change without them, whichever they are."""
    folder = saved("llama", tmp_path / "model", tie_word_embeddings=tied)
    model = loaded(folder)
    silent = torch.tensor([1, 4, 5, 9, 17, 20, 28, 31])
    with torch.no_grad():
        model.get_input_embeddings().weight[:, silent] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[silent] = 0
            layer.mlp.down_proj.weight[silent] = 0
    model.save_pretrained(folder)
    prune_hidden_size(folder, tmp_path / "out", 24, ROWS)
    kept = [c for c in range(32) if c not in silent]
    out = loaded(tmp_path / "out")
    assert torch.equal(out.get_input_embeddings().weight, model.get_input_embeddings().weight[:, kept])
    torch.testing.assert_close(logits(out, IDS), logits(model, IDS), rtol=1e-3, atol=2e-2)


def test_nothing_changes_if_nothing_is_removed(tmp_path: Path, loaded, logits) -> None:
    folder = saved("llama", tmp_path / "model")
    prune_hidden_size(folder, tmp_path / "out", 32, ROWS)
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), IDS), logits(loaded(folder), IDS), rtol=1e-3, atol=1e-3)


def test_the_dtypes_and_files_are_the_checkpoints(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    prune_hidden_size(folder, tmp_path / "out", 0.75, ROWS)
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()} == {torch.bfloat16}
    files = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"lmpress.json"}


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "cohere", "gpt_neox"])
def test_other_norms_are_refused(family: str, tmp_path: Path) -> None:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    base = BASE if family != "gpt2" else {k: v for k, v in BASE.items() if "num_" not in k and k != "hidden_size"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(base | shape))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="keeps its hidden size"):
        prune_hidden_size(tmp_path / "model", tmp_path / "out", 16, ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_impossible_sizes_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 200)
    words: dict[str, Any] = {"data": str(tmp_path / "text.txt"), "samples": 32, "seq_len": 16}
    for size in (0, 17, 3.5):
        with pytest.raises(UsageError, match="--hidden-size"):
            lmpress.distill(tiny, tmp_path / "out", hidden_size=size, **words)
    with pytest.raises(UsageError, match="different widths"):
        lmpress.distill(tiny, tmp_path / "out", hidden_size=8, options={"hidden": 1.0}, **words)


def test_layers_width_and_hidden_size_in_one_request(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcba" * 100)
    words: dict[str, Any] = {"data": str(tmp_path / "text.txt"), "samples": 32, "seq_len": 16}
    options = {"steps": 6, "batch": 4, "checks": 3}
    lmpress.distill(tiny, tmp_path / "out", layers=[1], mlp_width=16, hidden_size=8, options=options, **words)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size, config.head_dim) == (1, 16, 8, 8)

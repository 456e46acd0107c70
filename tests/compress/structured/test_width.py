"""Width pruning: the solver against brute force, and models that load anywhere and compute what was intended."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lmpress.calibrate.data.token_rows import TokenRows
from lmpress.calibrate.model.architecture import find_blocks, find_linears
from lmpress.compress.solver.channel_pruning import channels_to_remove, group_costs, refit_channels
from lmpress.compress.solver.damped_hessian import damp
from lmpress.compress.solver.loss import layer_loss
from lmpress.compress.structured.width import Width, prune_width
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
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "starcoder2": {},
}
WITH_HEADS = ("llama", "qwen3", "mistral", "gemma2", "starcoder2")
IDS = torch.randint(3, 31, (40, 12), generator=torch.Generator().manual_seed(0))


def problem(rows: int = 6, columns: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(200, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), 2 * x.T @ x / len(x)


def best_loss(weight: Tensor, matrix: Tensor, gone: list[int]) -> float:
    """Brute force: least squares on the columns that stay."""
    kept = [c for c in range(weight.shape[1]) if c not in gone]
    answer = torch.zeros_like(weight)
    answer[:, kept] = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ weight.T).T
    return layer_loss(weight - answer, matrix)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_costs_are_the_losses_after_least_squares(size: int) -> None:
    weight, hessian = problem()
    solved = damp(hessian, 0.01)
    costs = group_costs(weight, solved.inverse, size)
    for group in range(8 // size):
        columns = list(range(group * size, (group + 1) * size))
        assert float(costs[group]) == pytest.approx(best_loss(weight, solved.matrix, columns), rel=1e-8)


def test_the_selection_is_greedy_and_exact() -> None:
    weight, hessian = problem()
    solved, gone = damp(hessian, 0.01), []
    for _ in range(3):
        rest = [c for c in range(8) if c not in gone]
        gone.append(min(rest, key=lambda c: best_loss(weight, solved.matrix, [*gone, c])))
    found = channels_to_remove(weight, solved, 1, 3)
    assert found.nonzero().flatten().tolist() == sorted(gone)
    refitted = refit_channels(weight, solved, found)
    loss = best_loss(weight, solved.matrix, gone)
    assert layer_loss(weight - refitted, solved.matrix) == pytest.approx(loss, rel=1e-8)
    assert not refitted[:, found].any()
    assert loss <= 1.5 * min(best_loss(weight, solved.matrix, list(c)) for c in combinations(range(8), 3))


def test_dead_channels_are_removed_first() -> None:
    weight, hessian = problem()
    hessian[[2, 5]], hessian[:, [2, 5]] = 0, 0
    assert channels_to_remove(weight, damp(hessian, 0.01), 1, 2).nonzero().flatten().tolist() == [2, 5]


def saved(family: str, folder: Path) -> Path:
    own = {key: value for key, value in BASE.items() if family != "gpt2" or "num_" not in key}
    if family in ("gpt2", "opt"):  # their configs have another name for it
        del own["intermediate_size"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(own | FAMILIES[family])), dtype=torch.float32
    )
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_mlp(family: str, tmp_path: Path, loaded, logits) -> None:
    folder = saved(family, tmp_path / "model")
    for name, refit in (("refitted", True), ("plain", False)):
        prune_width(folder, tmp_path / name, Width(mlp=32, refit=refit), TokenRows(IDS, "random", 31))
    original, refitted, plain = (loaded(tmp_path / name) for name in ("model", "refitted", "plain"))
    wide, small = (sum(p.numel() for p in model.parameters()) for model in (original, refitted))
    assert small < wide
    widths = {
        m.in_features for b in find_blocks(refitted)[1] for m in find_linears(b).values() if hasattr(m, "in_features")
    }
    assert 48 not in widths
    errors = [float((logits(model, IDS) - logits(original, IDS)).square().mean()) for model in (refitted, plain)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("family", WITH_HEADS)
def test_fewer_heads(family: str, tmp_path: Path, loaded, logits) -> None:
    prune_width(
        saved(family, tmp_path / "model"), tmp_path / "out", Width(mlp=40, kv_heads=1), TokenRows(IDS, "random", 31)
    )
    model = loaded(tmp_path / "out")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 8)
    assert logits(model, IDS).isfinite().all()
    prompt = IDS[:1, :5]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(
        model.generate(prompt, use_cache=True, **options), model.generate(prompt, use_cache=False, **options)
    )


def test_nothing_changes_if_nothing_is_removed(tmp_path: Path, loaded, logits) -> None:
    folder = saved("llama", tmp_path / "model")
    prune_width(folder, tmp_path / "out", Width(mlp=48, kv_heads=2), TokenRows(IDS, "random", 31))
    assert torch.allclose(logits(loaded(tmp_path / "out"), IDS), logits(loaded(folder), IDS), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "width"),
    [("llama", Width(mlp=0)), ("llama", Width(mlp=64)), ("llama", Width(kv_heads=3)), ("phi3", Width(kv_heads=1))],
    ids=str,
)
def test_impossible_widths_are_refused(family: str, width: Width, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "model")
    with pytest.raises(UsageError):
        prune_width(folder, tmp_path / "out", width, TokenRows(IDS, "random", 31))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

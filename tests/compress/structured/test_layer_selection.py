"""The selection of layers: against cosines and divergences computed by hand, and fixed places against the published ones."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmpress.calibrate.data.token_rows import TokenRows
from lmpress.compress.formats.source import open_source
from lmpress.compress.structured.layer_selection import fixed_selection, greedy_selection, only_layers, select_layers
from lmpress.errors import UsageError

LAYERS = 5
IDS = torch.randint(3, 20, (6, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path: Path) -> LlamaForCausalLM:
    """Five random layers of different strength; the fourth does nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    for factor, layer in zip([1.0, 0.3, 0.6, 0.0, 0.5], model.model.layers, strict=True):
        layer.self_attn.o_proj.weight.data *= factor
        layer.mlp.down_proj.weight.data *= factor
    model.save_pretrained(tmp_path / "model")
    return model


def chosen(how: str, count: int, folder: Path) -> list[int]:
    return select_layers(how, count, open_source(folder / "model"), TokenRows(IDS, "random", 20), folder / "scratch")


def states(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """The input of each layer, and the output of the last one before the norm."""
    seen: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return [state.double() for state in seen]


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_influence_drops_the_layers_that_change_least(model: LlamaForCausalLM, tmp_path: Path) -> None:
    seen = states(model)
    changes = [float(1 - cosine(a, b).mean()) for a, b in pairwise(seen)]
    weakest = sorted(range(LAYERS), key=lambda layer: changes[layer])[:2]
    assert weakest[0] == 3
    assert chosen("influence", 3, tmp_path) == [layer for layer in range(LAYERS) if layer not in weakest]


def test_angular_drops_the_neighbours_that_change_least(model: LlamaForCausalLM, tmp_path: Path) -> None:
    seen = states(model)
    angles = [float(cosine(seen[i], seen[i + 2]).clamp(-1, 1).arccos().mean()) for i in range(LAYERS - 1)]
    first = angles.index(min(angles))
    assert chosen("angular", 3, tmp_path) == [layer for layer in range(LAYERS) if layer not in (first, first + 1)]


def test_greedy_drops_the_layers_that_cost_least(model: LlamaForCausalLM, tmp_path: Path) -> None:
    def cost(kept: list[int]) -> float:
        layers = model.model.layers
        with torch.no_grad():
            whole = model(IDS).logits.double().log_softmax(-1)
            model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
            model.config.num_hidden_layers = len(kept)
            part = model(IDS, use_cache=False).logits.double().log_softmax(-1)
        model.model.layers, model.config.num_hidden_layers = layers, LAYERS
        return float((whole.exp() * (whole - part)).sum())

    kept = list(range(LAYERS))
    for _ in range(2):
        kept = min(([k for k in kept if k != layer] for layer in kept), key=cost)
    assert 3 not in kept
    assert chosen("greedy", 3, tmp_path) == greedy_selection(model, IDS, 2) == kept


def test_only_layers_restores_the_model(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        before = model(IDS).logits
        with only_layers(model, [0, 2]):
            assert len(model.model.layers) == model.config.num_hidden_layers == 2
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("how", "count", "layers", "expected"),
    [
        ("spread", 6, 12, [1, 3, 5, 7, 9, 11]),
        ("spread", 5, 12, [1, 3, 6, 8, 11]),
        ("first", 2, 5, [3, 4]),
        ("last", 2, 5, [0, 1]),
    ],
)
def test_fixed_selections(how: str, count: int, layers: int, expected: list[int]) -> None:
    assert fixed_selection(how, count, layers) == expected


@pytest.mark.parametrize(("how", "count"), [("greedy", 0), ("influence", LAYERS), ("best", 2)])
def test_impossible_selections_are_refused(how: str, count: int, model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        chosen(how, count, tmp_path)

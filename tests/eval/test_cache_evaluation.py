"""Perplexity with a packed cache: that of decoding token by token, compared with the full cache's, with the bytes of both."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lmpress
from lmpress.cli import app
from lmpress.errors import UsageError
from lmpress.kernels.cache.cache import PackedCache
from lmpress.recipes.scheme import CacheScheme


@pytest.fixture
def text(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 8, (700,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text("".join("abcdefgh"[i] for i in letters))
    return str(tmp_path / "text.txt")


def wide(tiny: Path, length: int = 128) -> Path:
    """The tiny model with a longer context."""
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"max_position_embeddings": length}))
    return tiny


def test_perplexity_equals_that_of_decoding_token_by_token(tiny: Path, text: str) -> None:
    model = wide(tiny)
    found = lmpress.evaluate(model, text, seq_len=96, rows=3, kv_bits=2, kv_window=16)
    loaded = lmpress.load(model)
    tokenizer_ids = torch.tensor(["abcdefgh".index(c) + 2 for c in Path(text).read_text()])
    rows = torch.cat([torch.tensor([1]), tokenizer_ids])[: 3 * 96].view(3, 96)
    cache, logits = PackedCache(loaded.config, CacheScheme.of(2, 16)), []
    with torch.no_grad():
        for t in range(96):
            step = loaded(input_ids=rows[:, t : t + 1], past_key_values=cache, use_cache=True).logits
            logits.append(step.double())
        full = loaded(input_ids=rows).logits.double().log_softmax(-1)[:, :-1]
    own = torch.cat(logits, 1).log_softmax(-1)[:, :-1]
    nll = -own.gather(2, rows[:, 1:].unsqueeze(2)).mean()
    assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
    assert found.kl == pytest.approx(float((full.exp() * (full - own)).sum(-1).mean()), rel=1e-4) and found.kl > 1e-3
    assert found.cache_bytes == cache.nbytes // 3 and found.cache_bytes_base == cache.dense_nbytes // 3
    assert "kv=2 bits, window 16" in found.protocol


def test_inside_the_window_nothing_is_lost(tiny: Path, text: str) -> None:
    found = lmpress.evaluate(tiny, text, kv_bits=4, kv_window=64)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.perplexity == pytest.approx(found.perplexity_base or 0)
    assert found.cache_bytes == found.cache_bytes_base


def test_against_another_model_both_effects_are_measured(tiny: Path, tmp_path: Path, text: str) -> None:
    model = wide(tiny)
    lmpress.quantize(model, tmp_path / "w4", method="rtn", bits=4, group_size=8)
    options = {"seq_len": 96, "rows": 3}
    both = lmpress.evaluate(tmp_path / "w4", text, against=model, kv_bits=2, kv_window=16, **options)
    weights = lmpress.evaluate(tmp_path / "w4", text, against=model, **options)
    assert both.perplexity_base == weights.perplexity_base and both.kl != weights.kl
    assert weights.cache_bytes is None and "cache_bytes" not in weights.as_dict()


def test_the_cache_of_the_loaded_model_is_evaluated(tiny: Path, text: str) -> None:
    model = lmpress.load(wide(tiny), kv_bits=2, kv_window=16)
    assert "kv=2 bits" in lmpress.evaluate(model, text, seq_len=96, rows=2).protocol
    assert "kv=" not in lmpress.evaluate(model, text, seq_len=96, rows=2, kv_bits=16).protocol


def test_the_command(tiny: Path, text: str) -> None:
    model = wide(tiny)
    command = [
        "eval",
        str(model),
        "--data",
        text,
        "--seq-len",
        "96",
        "--rows",
        "2",
        "--kv-bits",
        "4",
        "--kv-window",
        "8",
    ]
    result = CliRunner().invoke(app, [*command, "--json", "-", "--quiet"])
    figures = json.loads(result.stdout)
    assert figures["cache_bytes"] < figures["cache_bytes_base"] and figures["kl"] > 0
    shown = CliRunner().invoke(app, command).output
    assert "cache" in shown.splitlines()[2] and "window 8, per token" in shown
    wrong = CliRunner().invoke(app, ["eval", str(model), "--data", text, "--kv-bits", "12"])
    assert wrong.exit_code == 2


def test_a_window_needs_bits(tiny: Path, text: str) -> None:
    with pytest.raises(UsageError, match="--kv-window needs a packed cache"):
        lmpress.evaluate(tiny, text, kv_window=8)

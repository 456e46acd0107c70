"""Fidelity: what a run measures block by block equals an evaluation of the finished checkpoint on the same tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lmpress
from lmpress.calibrate.data.token_rows import calibration_rows, held_out_rows
from lmpress.compress import run as module
from lmpress.compress.formats.tokenizer import load_tokenizer
from lmpress.recipes.schema import build

GRID = {"weights": {"bits": 3, "strategy": "group", "group_size": 8}}
INPUTS = {"bits": 8, "symmetric": True, "strategy": "token", "group_size": None, "formula": "signed", "dynamic": True}
RECIPES = {
    "rounded": {"passes": [{"method": "rtn", "scheme": GRID}]},
    "solved": {"passes": [{"method": "gptq", "scheme": GRID, "drift": 0.5}]},
    "rotated": {"passes": [{"method": "rotate"}, {"method": "rtn", "scheme": GRID}]},
    "table": {
        "passes": [{"method": "rtn", "scheme": GRID}],
        "embedding": {"bits": 3, "strategy": "group", "group_size": 8},
    },
    "inputs": {
        "passes": [
            {"method": "rtn", "scheme": {"weights": {**GRID["weights"], "bits": 8}, "inputs": {**INPUTS, "bits": 3}}}
        ]
    },
    "pruned": {"passes": [{"method": "magnitude", "scheme": {"weights": {"sparsity": 0.5}}}]},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_run_measures_what_an_evaluation_of_the_result_finds(
    name: str, tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEASURED_TOKENS", 64)
    monkeypatch.setattr(module, "MEASURED_LENGTH", 16)
    recipe = build({**RECIPES[name], "calibration": {"data": text, "samples": 4, "seq_len": 16}})
    report = lmpress.run(tiny, tmp_path / "out", recipe)
    found = report.fidelity
    assert found is not None and found.tokens == 64
    rows = held_out_rows(text, load_tokenizer(tiny), used(report), 16, 4, 0)
    assert rows is not None
    base, result = (lmpress.load(path) for path in (tiny, tmp_path / "out"))
    with torch.no_grad():
        logp, logq = (model(rows.ids).logits.log_softmax(-1) for model in (base, result))
    kl = (logp.exp() * (logp - logq)).sum(-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    assert found.kl > 1e-5
    assert found.top1_agreement == pytest.approx(float((logp.argmax(-1) == logq.argmax(-1)).float().mean()))
    for model, perplexity in ((logp, found.perplexity_base), (logq, found.perplexity)):
        loss = -model[:, :-1].gather(2, rows.ids[:, 1:].unsqueeze(2)).mean()
        assert perplexity == pytest.approx(float(loss.exp()), rel=1e-3)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["fidelity"] == found.as_dict() and written["verdict"] == report.verdict.word


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Documents of random letters, as JSON lines."""
    generator = torch.Generator().manual_seed(1)
    documents = ["".join("abcdefgh"[i] for i in torch.randint(8, (40,), generator=generator)) for _ in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    return str(tmp_path / "text.jsonl")


def used(report: module.RunReport) -> tuple[int, int] | None:
    """How many calibration rows there were, and how long."""
    return (4, 16) if any("tokens" in layer for layer in report.layers) else None


def test_held_out_rows_are_none_of_those_that_calibrate(tiny: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny)
    seen = calibration_rows(text, tokenizer, 4, 16)
    held = held_out_rows(text, tokenizer, (4, 16), 16, 4)
    assert held is not None and held.held_out
    rows = {tuple(row) for row in seen.ids.tolist()}
    assert not rows & {tuple(row) for row in held.ids.tolist()}


def test_a_text_that_calibration_uses_up_is_measured_on_and_says_so(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a b c d " * 6)
    tokenizer = load_tokenizer(tiny)
    data = str(tmp_path / "short.txt")
    seen = calibration_rows(data, tokenizer, 100, 8)
    held = held_out_rows(data, tokenizer, (100, 8), 8, 4)
    assert {tuple(row) for row in seen.ids.tolist()} & {tuple(row) for row in held.ids.tolist()} if held else False
    assert held is not None and not held.held_out


def test_random_tokens_are_not_text(tiny: Path) -> None:
    assert held_out_rows("random-tokens", load_tokenizer(tiny), (4, 8), 8, 4) is None


def test_a_model_without_a_tokenizer_is_unmeasured(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    report = lmpress.quantize(tmp_path / "model", tmp_path / "out", method="rtn", bits=8, group_size=8)
    assert report.fidelity is None
    assert report.verdict.word == "UNMEASURED" and "tokenizer" in report.verdict.reason


def test_learned_positions_reach_no_further_than_the_context(
    tmp_path: Path, text: str, make_model: Callable[..., PreTrainedModel], letters: PreTrainedTokenizerBase
) -> None:
    make_model("gpt2", n_positions=24).save_pretrained(tmp_path / "model")
    letters.save_pretrained(tmp_path / "model")
    report = lmpress.quantize(tmp_path / "model", tmp_path / "out", method="rtn", bits=8, group_size=8, calib=text)
    assert report.fidelity is not None and report.fidelity.kl < 0.1

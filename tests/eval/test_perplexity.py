"""Perplexity and divergence against loops over tokens in float64."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lmpress.compress.report.progress import Event
from lmpress.errors import CompressError, UsageError
from lmpress.eval.perplexity import Evaluation, evaluate
from lmpress.eval.tables import table

BOS = 1


@pytest.fixture
def text(tmp_path: Path) -> tuple[str, list[int]]:
    """A data file of random documents, and its stream of ids."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh", k=generator.randint(1, 30))) for _ in range(30)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": each}) for each in texts))
    return str(path), [token for each in texts for token in [BOS, *("abcdefgh".index(letter) + 2 for letter in each)]]


@pytest.fixture
def other(tmp_path: Path, tiny: Path, letters: PreTrainedTokenizerFast) -> Path:
    """The tiny model with noise on its weights."""
    model = LlamaForCausalLM.from_pretrained(tiny)
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(tmp_path / "other")
    letters.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def log_probabilities(path: Path, row: list[int]) -> Tensor:
    """Float64 `[length, vocabulary]`."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].log_softmax(-1)


def reference(model: Path, base: Path, ids: list[int], length: int, stride: int, rows: int | None) -> dict[str, float]:
    """Every figure by its definition, token by token."""
    per_row: list[list[tuple[float, float, float, bool]]] = []
    for start in range(0, len(ids) - length + 1, stride)[:rows]:
        row = ids[start : start + length]
        own, their = log_probabilities(model, row), log_probabilities(base, row)
        tokens = []
        for position in range(1, length):
            if start > 0 and position < length - stride:
                continue
            p, q = their[position - 1], own[position - 1]
            kl = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            tokens.append((-q[row[position]].item(), -p[row[position]].item(), kl, bool(p.argmax() == q.argmax())))
        per_row.append(tokens)
    flat = [token for row in per_row for token in row]
    n = len(flat)
    nll, nll_base, kl, top1 = (sum(token[i] for token in flat) / n for i in range(4))
    return {
        "tokens": n,
        "perplexity": math.exp(nll),
        "perplexity_base": math.exp(nll_base),
        "kl": kl,
        "top1_agreement": top1,
        "nll_difference": nll - nll_base,
        "perplexity_stderr": math.exp(nll) * standard_error([[token[0] for token in row] for row in per_row]),
        "perplexity_base_stderr": math.exp(nll_base) * standard_error([[token[1] for token in row] for row in per_row]),
        "kl_stderr": standard_error([[token[2] for token in row] for row in per_row]),
        "nll_difference_stderr": standard_error([[token[0] - token[1] for token in row] for row in per_row]),
    }


def standard_error(rows: list[list[float]]) -> float:
    """Of the mean over all tokens, with the rows as the sample (linearised ratio)."""
    count, tokens = len(rows), sum(map(len, rows))
    mean = sum(map(sum, rows)) / tokens
    residuals = [sum(row) - mean * len(row) for row in rows]
    return math.sqrt(sum(each**2 for each in residuals) / (count - 1) / count) / (tokens / count)


@pytest.mark.parametrize(
    ("length", "stride", "rows", "batch"),
    [(16, None, None, None), (16, 16, 5, 2), (16, 5, None, 3), (16, 15, 7, None), (32, 1, 6, 4), (9, 4, 8, 1)],
)
def test_every_figure_equals_the_definition(
    tiny: Path,
    other: Path,
    text: tuple[str, list[int]],
    length: int,
    stride: int | None,
    rows: int | None,
    batch: int | None,
) -> None:
    data, ids = text
    found = evaluate(other, data, seq_len=length, stride=stride, rows=rows, against=tiny, batch_size=batch).as_dict()
    expected = reference(other, tiny, ids, length, stride or length, rows)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert expected["kl"] > 0.01 and expected["top1_agreement"] < 1, (
        "the two models must differ for this to mean anything"
    )


def test_scores_do_not_depend_on_how_they_are_cut(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, other: Path, text: tuple[str, list[int]]
) -> None:
    whole = evaluate(other, text[0], seq_len=16, against=tiny)
    monkeypatch.setattr("lmpress.eval.perplexity.TOKENS_PER_SCORE", 7)
    cut = evaluate(other, text[0], seq_len=16, against=tiny, batch_size=3)
    assert (cut.perplexity, cut.kl, cut.sha256) == (
        pytest.approx(whole.perplexity),
        pytest.approx(whole.kl),
        whole.sha256,
    )


def test_a_model_equals_itself(tiny: Path, text: tuple[str, list[int]]) -> None:
    found = evaluate(tiny, text[0], seq_len=16, against=tiny)
    assert (found.kl, found.kl_stderr, found.top1_agreement, found.nll_difference) == (0, 0, 1, 0)
    assert found.perplexity == found.perplexity_base


def test_the_protocol_is_exact(tiny: Path, text: tuple[str, list[int]]) -> None:
    alone = evaluate(tiny, text[0], seq_len=16, stride=8, rows=4)
    folder = Path(text[0]).parent.name
    assert alone.protocol == (
        f"ppl[{folder}/text.jsonl, join=bos, win=16, stride=8, bos=per-document, rows=4, fp32, per token]"
    )
    assert alone.tokens == 15 + 3 * 8
    assert alone.kl is None and "kl" not in alone.as_dict()
    assert {"perplexity", "tokens", "protocol", "sha256", "tokens_per_second"} <= alone.as_dict().keys()
    json.dumps(alone.as_dict())


def test_the_default_row_is_the_context_and_more_is_refused(tiny: Path, text: tuple[str, list[int]]) -> None:
    assert "win=32, stride=32" in evaluate(tiny, text[0]).protocol
    with pytest.raises(UsageError, match="rows of 33 tokens exceed the model's context of 32"):
        evaluate(tiny, text[0], seq_len=33)


def test_one_row_has_no_standard_error(tiny: Path, text: tuple[str, list[int]]) -> None:
    assert evaluate(tiny, text[0], seq_len=16, rows=1).perplexity_stderr is None


def test_a_loaded_model_is_left_as_it_was(tiny: Path, text: tuple[str, list[int]]) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16, attention_dropout=0.5).train()
    found = evaluate(model, text[0], seq_len=16, rows=4, against=tiny)
    assert model.training and model.dtype == torch.bfloat16
    assert "bf16/fp32" in found.protocol and 0 < (found.kl or 0) < 0.01


def test_progress_counts_rows(tiny: Path, text: tuple[str, list[int]]) -> None:
    seen: list[Event] = []
    evaluate(tiny, text[0], seq_len=16, rows=5, batch_size=2, progress=seen.append)
    assert [(event.phase, event.block, event.blocks) for event in seen] == [
        ("evaluate", 2, 5),
        ("evaluate", 4, 5),
        ("evaluate", 5, 5),
    ]


def spoiled(model: PreTrainedModel) -> PreTrainedModel:
    """With an embedding of `h` that is no number: the first row with that letter is the first to fail."""
    next(model.get_input_embeddings().parameters()).data[9] = math.nan
    return model


def test_logits_that_are_not_finite_name_the_row(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "late.txt").write_text("a" * 15 + "a" * 16 + "aaah" * 4 + "a" * 16)
    model = spoiled(LlamaForCausalLM.from_pretrained(tiny, tie_word_embeddings=False))
    data = str(tmp_path / "late.txt")
    with pytest.raises(CompressError, match="the logits of the model are not finite in row 2"):
        evaluate(model, data, seq_len=16, batch_size=1)
    with pytest.raises(CompressError, match="the logits of the base are not finite in row 2"):
        evaluate(tiny, data, seq_len=16, batch_size=4, against=model)


def test_different_vocabularies_are_refused(
    tmp_path: Path, tiny: Path, text: tuple[str, list[int]], letters: PreTrainedTokenizerFast
) -> None:
    larger = LlamaForCausalLM.from_pretrained(tiny)
    larger.resize_token_embeddings(12)
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(UsageError, match="the model has 10 tokens and its base 12"):
        evaluate(tiny, text[0], against=tmp_path / "larger")
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "renamed")
    letters.add_tokens(["abc"])
    letters.save_pretrained(tmp_path / "renamed")
    with pytest.raises(UsageError, match="different tokenizers"):
        evaluate(tiny, text[0], against=tmp_path / "renamed")


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path, tiny: Path, letters: PreTrainedTokenizerFast) -> None:
    letters.add_tokens(["Z"])
    letters.save_pretrained(tiny)
    (tmp_path / "z.txt").write_text("abcZ" * 20)
    with pytest.raises(CompressError, match="the tokenizer returns the token 10, the model has 10"):
        evaluate(tiny, str(tmp_path / "z.txt"), seq_len=8)


@pytest.mark.parametrize(
    ("stride", "rows", "batch", "dtype", "message"),
    [
        (17, None, None, "float32", "--stride must be between 1 and the row length 16, got 17"),
        (0, None, None, "float32", "stride must be greater than or equal to 1, got 0"),
        (None, 0, None, "float32", "rows must be greater than or equal to 1, got 0"),
        (None, None, 0, "float32", "batch_size must be greater than or equal to 1, got 0"),
        (None, None, None, "int4", "dtype must be .float32.*, got .int4."),
    ],
)
def test_impossible_numbers_are_wrong_usage(
    tiny: Path,
    text: tuple[str, list[int]],
    stride: int | None,
    rows: int | None,
    batch: int | None,
    dtype: str,
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(tiny, text[0], seq_len=16, stride=stride, rows=rows, batch_size=batch, dtype=dtype)


def test_what_is_missing_is_said(tmp_path: Path, tiny: Path, text: tuple[str, list[int]]) -> None:
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(CompressError, match="too short: it has 4 tokens, and one row needs 16"):
        evaluate(tiny, str(tmp_path / "short.txt"), seq_len=16)
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(CompressError, match="has no tokenizer"):
        evaluate(tiny, text[0])
    with pytest.raises(CompressError, match="the model in memory has no tokenizer"):
        evaluate(
            LlamaForCausalLM(LlamaConfig(vocab_size=10, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)),
            text[0],
        )


@pytest.mark.parametrize(
    ("model", "data", "length", "perplexity"),
    [
        ("stories260K", "tinystories/test.jsonl", 256, 3.930),
        ("babyllama-105", "tinystories/test.jsonl", 256, 2.188),
        ("babygpt-shakespeare-gpt2", "tinyshakespeare/test.txt", 64, 8.731),
    ],
)
def test_trained_models_have_their_perplexity(
    assets: Path, model: str, data: str, length: int, perplexity: float
) -> None:
    found = evaluate(assets / "models" / model, str(assets / "data" / data), seq_len=length, rows=64)
    assert found.perplexity == pytest.approx(perplexity, abs=6e-4)
    assert found.tokens == 64 * (length - 1)


def render(evaluations: Table) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(evaluations)
    return capture.get()


def test_the_table_shows_figures_with_their_errors_and_the_protocol_once() -> None:
    alone = Evaluation(3.9303, 0.0994, 100, "ppl[a, b]", "0", 1234.4)
    both = Evaluation(4.1, None, 100, "ppl[a, b]", "0", 99.0, 3.9303, 0.0994, 0.01234, 0.001, 0.987, -1e-9, 0.002, 98.0)
    text = render(table({"[red]base": alone, "small": both}))
    base, small = (next(line for line in text.splitlines() if name in line) for name in ("[red]base", "small"))
    assert re.findall(r"│ *([^│]*[^│ ]) *", base)[1:] == ["3.930 ± 0.099", "-", "-", "-", "1,234"]
    assert re.findall(r"│ *([^│]*[^│ ]) *", small)[1:] == [
        "4.100",
        "0.01234 ± 0.00100",
        "98.70%",
        "+0.00000 ± 0.00200",
        "99",
    ]
    assert text.count("ppl[a, b]") == 1


def test_differing_protocols_are_both_shown() -> None:
    one, two = (Evaluation(1.0, None, 1, f"ppl[{name}]", "0", 1.0) for name in "ab")
    text = render(table({"x": one, "y": two}))
    assert "x: ppl[a]" in text and "y: ppl[b]" in text

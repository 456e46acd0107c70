"""Token rows: their sources, their packing, and errors for unusable data."""

import hashlib
import json
import struct
from contextlib import suppress
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import processors
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from lmpress.calibrate.data.documents import Documents, documents
from lmpress.calibrate.data.token_rows import TokenRows, calibration_rows, pack, stream, windows
from lmpress.calibrate.model.skeleton import context_length
from lmpress.compress.formats.tokenizer import load_tokenizer
from lmpress.errors import CompressError, UsageError

A, B, C, D, BOS = 2, 3, 4, 5, 1


def written(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def json_lines(path: Path, texts: list[str]) -> str:
    return written(path, "\n".join(json.dumps({"text": text}) for text in texts))


def test_every_document_starts_with_one_bos_and_an_incomplete_row_is_dropped(letters: PreTrainedTokenizerFast) -> None:
    found = pack(Documents(["ab", "c", "dd"], "test"), letters, 3)
    assert found.tolist() == [[BOS, A, B], [BOS, C, BOS]]
    assert found.dtype == torch.long


def test_a_tokenizer_that_adds_bos_does_not_add_a_second_one(letters: PreTrainedTokenizerFast) -> None:
    letters.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    assert letters("a")["input_ids"] == [BOS, A]
    assert stream(Documents(["a", "b"], "test"), letters).tolist() == [BOS, A, BOS, B]
    assert stream(Documents(["a", "b"], "test", join="c"), letters).tolist() == [BOS, A, C, B]


def test_a_document_that_starts_with_bos_gets_no_second_one(letters: PreTrainedTokenizerFast) -> None:
    assert stream(Documents(["<s>a", "b"], "test"), letters).tolist() == [BOS, A, BOS, B]


def test_no_bos_if_the_tokenizer_has_none(letters: PreTrainedTokenizerFast) -> None:
    letters.bos_token = None
    assert stream(Documents(["ab", "c"], "test"), letters).tolist() == [A, B, C]


def test_tokenising_stops_when_there_are_enough_rows(letters: PreTrainedTokenizerFast) -> None:
    many = Documents(["abc"] * 100, "test")
    assert pack(many, letters, 4, rows=5).tolist() == [[BOS, A, B, C]] * 5
    assert len(pack(many, letters, 4)) == 100


def test_windows_overlap_by_the_stride() -> None:
    assert windows(torch.arange(8), 4, 2, "test").tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]


def test_the_error_for_too_little_text_says_how_much_is_needed(letters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CompressError, match=r"short\.txt is too short: it has 3 tokens, and one row needs 8"):
        pack(Documents(["ab"], "short.txt"), letters, 8)
    with pytest.raises(UsageError, match=r"row length must be at least 2 .*, got 1"):
        pack(Documents(["ab"], "short.txt"), letters, 1)


def test_calibration_rows_follow_the_seed(letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = [first + second + third for first in "abcdefgh" for second in "abcdefgh" for third in "abcdefgh"]
    data = json_lines(tmp_path / "many.jsonl", texts)
    state = torch.random.get_rng_state()
    one, again, other = (calibration_rows(data, letters, 20, 4, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.ids, again.ids) and not torch.equal(one.ids, other.ids)
    assert one.ids.shape == (20, 4) and one.mask is None and one.notes == ()
    assert len({tuple(row) for row in one.ids.tolist()}) == 20, "drawn without replacement"
    whole = {(BOS, *(letters.convert_tokens_to_ids(letter) for letter in text)) for text in texts}
    assert {tuple(row) for row in one.ids.tolist()} <= whole
    assert one.ids[:, 1].unique().numel() > 4, "documents come from everywhere, not from the front"


def test_one_long_document_gives_random_rows_too(letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = written(tmp_path / "long.txt", "a" * 399 + "b" * 400)
    rows = calibration_rows(data, letters, 40, 4, seed=0)
    assert 5 < (rows.ids[:, 3] == B).sum() < 35


def test_fewer_rows_than_requested_are_all_used_with_a_note(letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = calibration_rows(written(tmp_path / "few.txt", "abcdefg"), letters, 10, 4)
    assert sorted(rows.ids.tolist()) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (
        len(rows.notes) == 1
        and "only 2 rows of 4 tokens" in rows.notes[0]
        and "fewer than the requested 10" in rows.notes[0]
    )


def test_fingerprint_and_token_counts_of_rows() -> None:
    ids = torch.tensor([[1, 2, 3], [3, 300, 0]])
    expected = hashlib.sha256(struct.pack("<6q", 1, 2, 3, 3, 300, 0)).hexdigest()
    rows = TokenRows(ids, "test", vocabulary=500)
    assert rows.fingerprint == expected
    assert rows.tokens == 6
    assert rows.vocabulary_share == 5 / 500
    padded = TokenRows(ids, "test", vocabulary=500, mask=torch.tensor([[True, True, True], [True, False, False]]))
    assert padded.tokens == 4 and padded.vocabulary_share == 3 / 500


def test_rows_with_little_of_the_vocabulary_are_noted(letters: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = written(tmp_path / "text.txt", "abcdefgh")
    assert calibration_rows(path, letters, 2, 4).notes == ()
    letters.add_tokens([f"<{number}>" for number in range(400)])
    rows = calibration_rows(path, letters, 2, 4)
    assert len(rows.notes) == 1 and f"only {rows.vocabulary_share:.1%} of the {len(letters)} tokens" in rows.notes[0]


def test_files_are_read(tmp_path: Path) -> None:
    texts = ["one\n\ntwo", "drei: äöü \u2028 here"]
    folder = tmp_path / "set"
    folder.mkdir()
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": texts}), folder / "x.parquet")
    plain = "\ufeff" + texts[0]
    assert documents(written(folder / "x.txt", plain), "heldout") == Documents([texts[0]], "set/x.txt")
    lines = "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n"
    assert documents(written(folder / "x.jsonl", lines), "heldout") == Documents(texts, "set/x.jsonl")
    assert documents(str(folder / "x.parquet"), "calibration") == Documents(texts, "set/x.parquet")


def test_the_built_in_corpus_gets_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmpress.calibrate.data.documents.builtin_documents", lambda split: [f"texts of {split}"])
    assert documents("python-stdlib", "heldout") == Documents(["texts of heldout"], "python-stdlib/heldout")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt is empty"),
        ("blank.jsonl", "\n \n", "blank.jsonl is empty"),
        ("latin.txt", b"ab\ncd\xe4", r"not UTF-8: byte 5 \(line 2\) is 0xe4"),
        ("latin.jsonl", b'{"text": "\xe4"}', r"not UTF-8: byte 10 \(line 1\)"),
        ("bad.jsonl", '{"text": "a"}\n\n{"text": ', "bad.jsonl, line 3: not valid JSON"),
        ("other.jsonl", '{"content": "a"}', "line 1: there is no string field `text`"),
        ("list.jsonl", '{"text": "a"}\n["a"]', "line 2: there is no string field `text`"),
        ("number.jsonl", '{"text": 3}', "line 1: there is no string field `text`"),
        ("deep.jsonl", "[" * 50_000 + "]" * 50_000, "line 1: not valid JSON .*nested more than"),
        (
            "half.jsonl",
            '{"text": "a"}\n{"text": "ab\\ud800"}',
            "line 2: `text` holds half a surrogate pair at character 2",
        ),
        ("bad.parquet", "no parquet", "not a readable parquet file"),
    ],
)
def test_unusable_content_is_located(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(CompressError, match=message):
        documents(written(tmp_path / name, content), "heldout")


def test_damaged_tables_are_explained(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["some text"] * 5}), file)
    whole = file.read_bytes()
    for start in range(4, len(whole) - 8):
        file.write_bytes(whole[:start] + b"\0\0\0\0" + whole[start + 4 :])
        with suppress(CompressError):
            documents(str(file), "heldout")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["a"], "id": [1]}, "no column `text`; its columns are content, id"),
        ({"text": ["a", None]}, "row 2: `text` is not a string"),
        ({"text": [1]}, "row 1: `text` is not a string"),
    ],
)
def test_unusable_tables_are_explained(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(CompressError, match=message):
        documents(str(tmp_path / "x.parquet"), "heldout")


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.txt", "no such file"), ("dir/absent.csv", "unsupported kind"), ("wikitex", "wikitext2, ptb, c4")],
)
def test_unknown_names_are_usage_errors(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        documents(name, "heldout")


def test_hub_sets_follow_the_publications(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, config: str | None, *, split: str, **_: object) -> list[dict[str, str]]:
        asked.append((path, config, split))
        return [{"text": "a", "sentence": "s"}] * 2000

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents("wikitext2", "heldout") == Documents(["a"] * 2000, "wikitext2/test", join="\n\n")
    assert documents("ptb", "calibration") == Documents(["s"] * 2000, "ptb/train", join=" ")
    assert len(documents("c4", "heldout").texts) == 1100
    assert documents("org/name:part", "heldout").join == "bos"
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("ptb-text-only/ptb_text_only", None, "train"),
        ("allenai/c4", None, "validation"),
        ("org/name", "part", "test"),
    ]


def test_the_error_for_an_unreachable_hub_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CompressError, match=r"wikitext2 .split test. could not be downloaded.*reach it.*python-stdlib"):
        documents("wikitext2", "heldout")


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path, tiny: Path) -> None:
    written(tmp_path / "config.json", '{"model_type": "llama"}')
    with pytest.raises(CompressError, match="has no tokenizer; copy the original"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tiny)("abc", add_special_tokens=False)["input_ids"] == [A, B, C]


def test_a_broken_tokenizer_is_an_error(tmp_path: Path) -> None:
    written(tmp_path / "tokenizer.json", "{")
    with pytest.raises(CompressError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer.json", {"model": 3}, r"cannot be read \(Exception"),
        ("tokenizer.json", {"added_tokens": {"x": 0}}, "cannot be read"),
        ("tokenizer_config.json", {"model_max_length": {}}, r"cannot be read \(TypeError"),
        ("tokenizer_config.json", {"x": 0}, "nested|recursion"),
        ("config.json", {"max_position_embeddings": "x"}, r"config\.json is not valid: .*max_position_embeddings"),
    ],
)
def test_what_the_tokenizers_library_refuses_is_an_error(
    tiny: Path, file: str, changes: dict[str, object], message: str
) -> None:
    text = json.dumps(json.loads((tiny / file).read_text()) | changes)
    written(tiny / file, text.replace('"x": 0', '"x": ' + "[" * 50_000 + "]" * 50_000) if "x" in changes else text)
    with pytest.raises(CompressError, match=message):
        load_tokenizer(tiny)


def test_context_length_is_read_from_either_name() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=55)) == 55

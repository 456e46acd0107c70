"""Parsing of foreign JSON and YAML: limits of depth, no doubled keys, no aliases, errors as ValueError."""

from pathlib import Path

import pytest

from lmpress.errors import UsageError
from lmpress.recipes.parsing import DEPTH, parse_json, parse_yaml, readable


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_valid_texts_are_parsed(parse) -> None:
    nested = "[" * DEPTH + "]" * DEPTH
    assert parse('{"a": [1, {"b": null}], "c": {"b": "x"}}') == {"a": [1, {"b": None}], "c": {"b": "x"}}
    assert str(parse(nested)) == nested


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested more than"),
        ("[" * 50_000 + "]" * 50_000, "nested more than"),
        ('{"a": [{"b": 1, "c": 2, "b": 3}]}', "the key 'b' occurs twice"),
        ("[1,", "line 1"),
    ],
)
def test_limits(parse, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_yaml_that_expands_and_impossible_dates_are_refused() -> None:
    laughs = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"
    with pytest.raises(ValueError, match="aliases"):
        parse_yaml(laughs)
    with pytest.raises(ValueError, match="month"):
        parse_yaml("seed: 2024-99-99")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("n" * 300)):
        with pytest.raises(UsageError, match=f"{path} cannot be read"), readable(path):
            path.read_bytes()

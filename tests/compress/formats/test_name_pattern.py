"""Patterns of layer names: they match as `re` does, in bounded time, and what is not supported is refused."""

import random
import re
import time

import pytest

from lmpress.compress.formats.name_pattern import matches

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.12.mlp.experts.3.up_proj", "lm_head", "", "a", "ab\n", "b.")
PATTERNS = (
    r".*self_attn\.(q|k|v)_proj$",
    r".*\.experts\.\d+\..*",
    r"^model\.layers\.(?:[0-9]|1[0-2])\..*proj",
    r"^(?!.*lm_head).*$",
    r"(?=.*q_proj)model",
    r"layers",
    r"model[^\d]+\d{1,2}\.",
    r"[\w.]+?_proj",
    r"a{0,3}b?$",
    r"",
    r"|x",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_common_patterns_match_as_in_re(pattern: str) -> None:
    for name in NAMES:
        # `$` of re matches before a final newline too, which no layer has
        assert matches(pattern, name) == (re.match(pattern.replace("$", r"\Z"), name) is not None), name


def random_pattern(numbers: random.Random, depth: int = 0) -> str:
    kind = numbers.randrange(5 if depth < 3 else 2)
    if kind < 2:
        part = numbers.choice(("a", "b", ".", "[ab]", "[^a]", r"\w", r"\."))
    elif kind == 2:
        part = f"({random_pattern(numbers, depth + 1)}|{random_pattern(numbers, depth + 1)})"
    elif kind == 3:
        part = f"(?:{random_pattern(numbers, depth + 1)})"
    else:
        part = f"(?{numbers.choice('!=')}{random_pattern(numbers, depth + 1)})(?:a|b)"
    part += numbers.choice(("", "", "*", "+", "?", "{2}", "{1,2}", "{1,}", "*?"))
    return part + (random_pattern(numbers, depth) if numbers.random() < 0.4 else "")


def test_random_patterns_match_as_in_re() -> None:
    numbers = random.Random(0)
    found = set()
    for _ in range(400):
        pattern = random_pattern(numbers) + numbers.choice(("", "$"))
        name = "".join(numbers.choice("ab.") for _ in range(numbers.randrange(7)))
        found.add(matches(pattern, name))
        assert matches(pattern, name) == (re.match(pattern, name) is not None), (pattern, name)
    assert found == {True, False}


@pytest.mark.parametrize(
    "pattern", ["((a*)*)*b", "(a|aa)*b", "(((a?){50}){50}){50}b", "(a|a|a)*(.*.*.*)*b", "(((a+)+)+)+b"]
)
def test_time_is_bounded(pattern: str) -> None:
    started = time.process_time()
    assert not matches(pattern, "a" * 300)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "pattern",
    [
        "(a)\\1",
        "(?P<x>a)",
        "(?<=a)b",
        "(a",
        "a)",
        "[a",
        "*a",
        "a**",
        "a{101}",
        "\\",
        "\\b",
        "a" * 3000,
        "(" * 50 + ")" * 50,
        "[b-a]",
    ],
)
def test_what_is_not_supported_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="supported"):
        matches(pattern, "aa")


def test_names_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="a name of 501 characters"):
        matches("a*", "a" * 501)

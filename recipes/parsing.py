"""JSON and YAML that others wrote: parsed with limits, so that a short text cannot take unlimited stack, time or memory."""

import json
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError

DEPTH = 100  # levels of lists and mappings; what users nest has fewer than 10
TOO_DEEP = f"it is nested more than {DEPTH} levels deep"


def parse_json(text: str | bytes) -> Any:
    """The value of the JSON `text` (bytes: UTF-8, -16 or -32).

    Raises `ValueError` if it is not valid JSON, is nested too deeply, or if an object has a key twice.
    """
    try:
        found = json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level = [found]
    for _ in range(DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return found
    raise ValueError(TOO_DEEP)


def parse_yaml(text: str) -> Any:
    """The value of the YAML `text`.

    Raises `ValueError` if it is not valid YAML, is nested too deeply, has aliases (a few lines of which expand without limit),
    or if a mapping has a key twice.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 a safe loader
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Raise `UsageError` with the name of `file` in place of the `OSError` of a file that cannot be read."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror})", "check the file and its permissions") from error


class _Loader(yaml.SafeLoader):
    """The safe loader, with limits."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, which must not be an alias or too deep."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not supported")
        self._depth += 1
        if self._depth > DEPTH:
            raise ValueError(TOO_DEEP)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a node. Raises `ValueError` if it has a key twice."""
        keys = [key.value for key, _ in node.value]
        _check_doubles([key for key in keys if isinstance(key, str)])
        return super().construct_mapping(node, deep)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_doubles([key for key, _ in pairs])
    return dict(pairs)


def _check_doubles(keys: list[str]) -> None:
    if len(set(keys)) < len(keys):
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {twice[:80]!r} occurs twice")

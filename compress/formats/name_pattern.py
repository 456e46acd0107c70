r"""Regular expressions that other people's configs hold, matched in time that the length of a name bounds.

`re` tries the ways to match one after the other, exponentially many for `((a*)*)*b`. Here a part of a pattern maps the set of
places where it can begin to the set of places where it can end: no place is visited twice for the same part.

Supported are literals, `.`, classes, `\d \w \s` and their opposites, groups, `|`, `* + ? {m,n}` (lazy or not), `^ $` and
lookahead. Anything else, such as a back reference, is refused.
"""

import re
from collections.abc import Callable
from functools import lru_cache

Places = frozenset[int]
Part = Callable[[str, Places], Places]
LONGEST = 2_000  # characters of a pattern
LONGEST_NAME = 500
NESTED = 20  # groups
MOST = 100  # repetitions that are counted
ESCAPES = "dwsDWS"


def matches(pattern: str, name: str) -> bool:
    """Whether a prefix of `name` matches, as `re.match` has it.

    Raises `ValueError` for a pattern that is not valid or not supported, and for a name that is too long.
    """
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a layer has a name of {len(name):,} characters; {LONGEST_NAME:,} are supported")
    return bool(_compiled(pattern)(name, frozenset({0})))


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Part:
    if len(pattern) > LONGEST:
        raise ValueError(f"a pattern of {len(pattern):,} characters; {LONGEST:,} are supported")
    parser = _Parser(pattern)
    part = parser.alternatives(0)
    if parser.rest:
        raise parser.error()
    return part


class _Parser:
    """A pattern and the place up to which it has been read."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at = pattern, 0

    @property
    def rest(self) -> str:
        """What has not been read."""
        return self._pattern[self._at :]

    def error(self) -> ValueError:
        """The error for what comes next."""
        return ValueError(f"the pattern {self._pattern[:200]!r} is not supported from character {self._at} on")

    def alternatives(self, level: int) -> Part:
        """Sequences with `|` between them."""
        found = [self._sequence(level)]
        while self._take("|"):
            found.append(self._sequence(level))
        return found[0] if len(found) == 1 else _any_of(found)

    def _sequence(self, level: int) -> Part:
        parts = []
        while self.rest and self.rest[0] not in "|)":
            parts.append(self._repeated(level))
        return _one_after_another(parts)

    def _repeated(self, level: int) -> Part:
        part = self._atom(level)
        counted = re.match(r"\{(\d{1,3})(,?)(\d{0,3})\}", self.rest)
        if counted:
            self._at += counted.end()
            low = int(counted[1])
            high = int(counted[3]) if counted[3] else None if counted[2] else low
            if max(low, high or 0) > MOST:
                raise self.error()
        elif self.rest[:1] in ("*", "+", "?") and self.rest:
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.rest[0]]
            self._at += 1
        else:
            return part
        self._take("?")  # lazy: the same names match
        if self.rest[:1] in ("*", "+", "?", "{") and self.rest:
            raise self.error()
        return _repetition(part, low, high)

    def _atom(self, level: int) -> Part:
        here = self.rest[0]
        if here == "(":
            return self._group(level)
        if here == "[":
            return self._character_class()
        if here in "*+?{":
            raise self.error()
        self._at += 1
        if here == "^":
            return lambda name, places: places & {0}
        if here == "$":
            return lambda name, places: places & {len(name)}
        if here == "\\":
            return self._escaped()
        return _character(re.compile("." if here == "." else re.escape(here)))

    def _escaped(self) -> Part:
        letter = self.rest[:1]
        if not letter or (letter.isalnum() and letter not in ESCAPES):
            raise self.error()
        self._at += 1
        return _character(re.compile("\\" + letter))

    def _character_class(self) -> Part:
        found = re.match(r"\[\^?\]?(?:\\[^a-zA-Z0-9]|\\[dwsDWS]|[^\]\\\[])*\]", self.rest)
        if not found:
            raise self.error()
        try:
            compiled = re.compile(found[0])
        except re.error:
            raise self.error() from None
        self._at += found.end()
        return _character(compiled)

    def _group(self, level: int) -> Part:
        if level == NESTED:
            raise self.error()
        kind = next((kind for kind in ("(?:", "(?=", "(?!") if self.rest.startswith(kind)), "(")
        if kind == "(" and self.rest.startswith("(?"):
            raise self.error()
        self._at += len(kind)
        part = self.alternatives(level + 1)
        if not self._take(")"):
            raise self.error()
        return part if kind in ("(", "(?:") else _lookahead(part, wanted=kind == "(?=")

    def _take(self, character: str) -> bool:
        found = self.rest.startswith(character)
        self._at += found
        return found


def _character(compiled: re.Pattern[str]) -> Part:
    def part(name: str, places: Places) -> Places:
        return frozenset(place + 1 for place in places if place < len(name) and compiled.match(name[place]))

    return part


def _one_after_another(parts: list[Part]) -> Part:
    def part(name: str, places: Places) -> Places:
        for each in parts:
            places = each(name, places)
        return places

    return part


def _any_of(parts: list[Part]) -> Part:
    return lambda name, places: frozenset().union(*(each(name, places) for each in parts))


def _repetition(once: Part, low: int, high: int | None) -> Part:
    def ends(name: str, place: int) -> Places:
        places = frozenset({place})
        for _ in range(low):
            before, places = places, once(name, places)
            if places == before:
                break
        found = new = places
        left = len(name) + 1 if high is None else high - low
        while new and left > 0:
            new = once(name, new) - found
            found |= new
            left -= 1
        return found

    return _remembered(ends)


def _remembered(ends: Callable[[str, int], Places]) -> Part:
    """A part of what `ends` says of one place, which is computed once per place of a name, however deep parts are nested."""
    known: dict[int, Places] = {}
    latest = ""

    def part(name: str, places: Places) -> Places:
        nonlocal latest
        if name != latest:
            known.clear()
            latest = name
        for place in places:
            if place not in known:
                known[place] = ends(name, place)
        return frozenset().union(*(known[place] for place in places))

    return part


def _lookahead(inner: Part, wanted: bool) -> Part:
    return lambda name, places: frozenset(p for p in places if bool(inner(name, frozenset({p}))) == wanted)

"""Changes to bytes and to JSON documents; the same seed always makes the same change.

Where there is a choice of places the one with the smallest hash is taken: a key that is added to a document moves few of the
others' changes.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import Any

Mutator = Callable[[bytes, str], bytes]  # of a file's content and a seed
DEEP, DOUBLE = "\0deep\0", "\0double\0"  # markers that become text which no value can express
LONG_NAME = "n" * 250
EXPLODING = r"re:^(([a-z_.0-9])*)*\1#$"
VALUES: Sequence[Any] = (
    0, -1, 1, 3, 0.5, -0.5, 10**9, 10**30, 2**31, 2**63, float("nan"), float("inf"), "", "x", "../../x", LONG_NAME, EXPLODING,
    "\ud800", "a\0b", None, True, False, [], {}, [[]], [0], {"x": 0}, [None] * 3, DEEP,
)  # fmt: skip


def order(seed: str, place: object) -> bytes:
    """The rank of a place among those that a change with this seed could happen at."""
    return sha256(f"{seed}|{place}".encode()).digest()


def choose(seed: str, places: Sequence[Any]) -> Any:
    """The place with the smallest rank."""
    return min(places, key=lambda place: order(seed, repr(place)))


def generator(seed: str) -> random.Random:
    """Random numbers of a seed."""
    return random.Random(sha256(seed.encode()).digest())


# --- bytes -------------------------------------------------------------------------------------------------------------


def flip(data: bytes, seed: str) -> bytes:
    """One to eight bytes become others."""
    numbers, changed = generator(seed), bytearray(data)
    for _ in range(numbers.choice((1, 1, 2, 8))):
        if changed:
            changed[numbers.randrange(len(changed))] ^= numbers.randrange(1, 256)
    return bytes(changed)


def insert(data: bytes, seed: str) -> bytes:
    """Random bytes, or some of its own again, in between."""
    numbers = generator(seed)
    place, count = numbers.randrange(len(data) + 1), numbers.choice((1, 3, 8, 100))
    more = numbers.randbytes(count) if numbers.random() < 0.5 else data[place : place + count] or b"\0"
    return data[:place] + more + data[place:]


def delete(data: bytes, seed: str) -> bytes:
    """Some bytes are missing in between."""
    numbers = generator(seed)
    place = numbers.randrange(max(1, len(data)))
    return data[:place] + data[place + numbers.choice((1, 3, 8, 100)) :]


def truncate(data: bytes, seed: str) -> bytes:
    """The end is missing, perhaps everything."""
    numbers = generator(seed)
    return data[: numbers.choice((0, 1, 7, numbers.randrange(max(1, len(data))), max(0, len(data) - 1)))]


def replace(data: bytes, seed: str) -> bytes:
    """A piece, perhaps all, becomes zeros, spaces, brackets or noise."""
    numbers = generator(seed)
    size = numbers.choice((4, 64, len(data)))
    place = numbers.randrange(max(1, len(data) - size + 1))
    piece = numbers.choice((b"\0" * size, b" " * size, b"[" * size, b"\xff\xfe" * size, numbers.randbytes(size)))
    return data[:place] + piece[:size] + data[place + size :]


BYTES: dict[str, Mutator] = {each.__name__: each for each in (flip, insert, delete, truncate, replace)}


# --- JSON documents ----------------------------------------------------------------------------------------------------


def paths(document: Any, here: tuple[Any, ...] = (), most: int = 40) -> Iterator[tuple[Any, ...]]:
    """The paths to every value in a document, to the first `most` of every list or object."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for _, (key, value) in zip(range(most), items, strict=False):
        yield (*here, key)
        yield from paths(value, (*here, key), most)


def at(document: Any, path: Sequence[Any]) -> Any:
    """What lies at a path."""
    for key in path:
        document = document[key]
    return document


def change_value(document: Any, seed: str) -> Any:
    """A value becomes another one, mostly of another type or out of range."""
    path = choose(seed, list(paths(document)))
    at(document, path[:-1])[path[-1]] = choose(seed, VALUES)
    return document


def change_number(document: Any, seed: str) -> Any:
    """A number becomes another number."""
    numbers = [path for path in paths(document) if type(at(document, path)) in (int, float)]
    if not numbers:
        return change_value(document, seed)
    path = choose(seed, numbers)
    at(document, path[:-1])[path[-1]] = choose(seed, [value for value in VALUES if type(value) in (int, float)])
    return document


def change_text(document: Any, seed: str) -> Any:
    """A string becomes another string."""
    texts = [path for path in paths(document) if isinstance(at(document, path), str)]
    if not texts:
        return change_value(document, seed)
    path = choose(seed, texts)
    at(document, path[:-1])[path[-1]] = choose(seed, [value for value in VALUES if isinstance(value, str)])
    return document


def explode(document: Any, seed: str) -> Any:
    """A string in a list, where patterns of names stand, becomes a regular expression that needs exponential time."""
    texts = [path for path in paths(document) if isinstance(path[-1], int) and isinstance(at(document, path), str)]
    if not texts:
        return change_text(document, seed)
    path = choose(seed, texts)
    at(document, path[:-1])[path[-1]] = EXPLODING
    return document


def _keyed(document: Any) -> list[tuple[Any, ...]]:
    return [path for path in paths(document) if isinstance(path[-1], str)]


def remove(document: Any, seed: str) -> Any:
    """A key is missing."""
    path = choose(seed, _keyed(document))
    del at(document, path[:-1])[path[-1]]
    return document


def double(document: Any, seed: str) -> Any:
    """A key stands twice, with two values."""
    path = choose(seed, _keyed(document))
    at(document, path[:-1])[f"{path[-1]}{DOUBLE}"] = choose(seed, VALUES)
    return document


def rename(document: Any, seed: str) -> Any:
    """A key gets a name of 250 characters."""
    path = choose(seed, _keyed(document))
    holder = at(document, path[:-1])
    holder[LONG_NAME] = holder.pop(path[-1])
    return document


def whole(document: Any, seed: str) -> Any:
    """The document is a value of another type."""
    return choose(seed, [value for value in VALUES if type(value) is not type(document)])


DOCUMENTS: dict[str, Callable[[Any, str], Any]] = {
    "value": change_value,
    "number": change_number,
    "text": change_text,
    "explode": explode,
    "remove": remove,
    "double": double,
    "rename": rename,
    "whole": whole,
}


def dump(document: Any) -> str:
    """The document as JSON text, markers written out."""
    text = json.dumps(document)
    for marker, written in ((DEEP, "[" * 50_000 + "]" * 50_000), (DOUBLE, "")):
        quoted = json.dumps(marker)
        text = text.replace(quoted, written) if marker == DEEP else text.replace(quoted[1:-1], written)
    return text


def in_json(change: Callable[[Any, str], Any]) -> Mutator:
    """The change of a document as one of the file that holds it."""
    return lambda data, seed: dump(change(json.loads(data), seed)).encode(errors="surrogatepass")


JSON: dict[str, Mutator] = BYTES | {name: in_json(change) for name, change in DOCUMENTS.items()}

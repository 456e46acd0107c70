"""Changes that know what is inside: safetensors, GGUF, recipes, texts."""

import io
import json
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from mutations import BYTES, DOCUMENTS, JSON, LONG_NAME, Mutator, choose, dump, flip, generator, in_json, truncate

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1}
EXTREMES = {  # one value of a tensor's dtype, as bytes
    "F32": [struct.pack("<f", value) for value in (math.nan, math.inf, -math.inf, 0.0, 3e38, -1.0)],
    "F16": [struct.pack("<e", value) for value in (math.nan, math.inf, -math.inf, 0.0, 6e4, -1.0)],
    "BF16": [bytes(value) for value in ([0xC0, 0x7F], [0x80, 0x7F], [0, 0], [0x7F, 0x7F], [0x80, 0xBF])],
    "I64": [struct.pack("<q", value) for value in (0, -1, 1, 10**9, 2**31, 2**62)],
    "I32": [struct.pack("<i", value) for value in (0, -1, 1, 10**9, 2**31 - 1)],
}
Header = dict[str, Any]


# --- safetensors -------------------------------------------------------------------------------------------------------


def open_header(data: bytes) -> tuple[Header, bytes]:
    """The header and the bytes behind it."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def close_header(header: Any, rest: bytes) -> bytes:
    """A file of them."""
    text = dump(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


def in_header(change: Callable[[Any, str], Any]) -> Mutator:
    """The change of a document as one of the header of a safetensors file."""

    def mutate(data: bytes, seed: str) -> bytes:
        header, rest = open_header(data)
        return close_header(change(header, seed), rest)

    return mutate


def _tensors(header: Header) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


def length(data: bytes, seed: str) -> bytes:
    """The header's length is another one."""
    lengths = (0, 1, 2, 8, len(data) - 8, len(data), 10**9, 6 * 2**30, 2**63, 2**64 - 1)
    return struct.pack("<Q", choose(seed, lengths)) + data[8:]


def offsets(header: Header, seed: str) -> Header:
    """A tensor lies on another one, outside of the file, backwards or nowhere."""
    entry, other = (header[choose(f"{seed}{which}", _tensors(header))] for which in ("a", "b"))
    start, stop = entry["data_offsets"]
    places = [[stop, start], [start + 1, stop + 1], [start, stop + 4], [start + 2**40, stop + 2**40], [-4, stop - start - 4],
              [0, 2**63], [float(start), float(stop)], list(other["data_offsets"]), [start], [start, stop, stop]]  # fmt: skip
    entry["data_offsets"] = choose(seed, places)
    return header


def shape(header: Header, seed: str) -> Header:
    """A tensor has another shape: of the same size, of another one, absurd, or of no numbers."""
    entry = header[choose(seed, _tensors(header))]
    lengths = entry["shape"]
    shapes = [lengths[::-1], [math.prod(lengths)], [1, *lengths], [*lengths, 1], [0], [], [-1], [2**40, 2**40],
              [10**9, 10**9, 0], [1] * 1000, [float(each) for each in lengths], "x", None,
              [[each] for each in lengths]]  # fmt: skip
    entry["shape"] = choose(seed, shapes)
    return header


def dtype(header: Header, seed: str) -> Header:
    """A tensor has another dtype; its length fits, so that only the values are others."""
    name = choose(seed, _tensors(header))
    entry = header[name]
    entry["dtype"] = choose(seed, ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "x", 0, None])
    if entry["dtype"] in ITEM_BYTES and (math.prod(entry["shape"]) and entry["shape"]):
        total = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["shape"] = [total // ITEM_BYTES[entry["dtype"]]]
    return header


def drop(header: Header, seed: str) -> Header:
    """A tensor is missing."""
    del header[choose(seed, _tensors(header))]
    return header


def swap(header: Header, seed: str) -> Header:
    """Two tensors of one shape lie in each other's place."""
    first = header[choose(seed, _tensors(header))]
    alike = [n for n in _tensors(header) if header[n]["shape"] == first["shape"] and header[n] is not first]
    second = header[choose(seed, alike)] if alike else first
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    return header


def long_name(header: Header, seed: str) -> Header:
    """A tensor has a name of 250 characters."""
    header[LONG_NAME] = header.pop(choose(seed, _tensors(header)))
    return header


def values(data: bytes, seed: str) -> bytes:
    """One value of a tensor, or all of them, become extreme; small tensors of sizes among them."""
    header, rest = open_header(data)
    entry = header[choose(seed, [name for name in _tensors(header) if header[name]["dtype"] in EXTREMES])]
    value, (start, stop) = choose(seed, EXTREMES[entry["dtype"]]), entry["data_offsets"]
    everywhere = choose(seed, [True, False])
    place = start + generator(seed).randrange((stop - start) // len(value)) * len(value)
    begin, count = (start, (stop - start) // len(value)) if everywhere else (place, 1)
    return close_header(header, rest[:begin] + value * count + rest[begin + len(value) * count :])


def data_bytes(data: bytes, seed: str) -> bytes:
    """Bytes behind the header change."""
    header, rest = open_header(data)
    return close_header(header, flip(rest, seed))


SAFETENSORS: dict[str, Mutator] = (
    BYTES
    | {f"header-{name}": in_header(change) for name, change in DOCUMENTS.items()}
    | {each.__name__: in_header(each) for each in (offsets, shape, dtype, drop, swap, long_name)}
    | {"length": length, "values": values, "data": data_bytes}
)


# --- GGUF --------------------------------------------------------------------------------------------------------------

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of metadata values by type
STRING, ARRAY = 8, 9
NUMBERS = (0, 1, 2, 3, 7, 10**7, 10**9, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
Field = tuple[str, int, int]  # what it is, its offset, its bytes


def gguf_fields(data: bytes) -> Iterator[Field]:
    """Every number and string of the metadata and tensor records of a GGUF file, version 3."""
    yield from (("magic", 0, 4), ("version", 4, 4), ("tensors", 8, 8), ("entries", 16, 8))
    tensors, entries = struct.unpack_from("<QQ", data, 8)
    place = 24
    for index in range(entries):
        key, place = _string(data, place)
        yield from ((f"key length {index}", key[0] - 8, 8), (f"key {index}", *key))
        kind = struct.unpack_from("<I", data, place)[0]
        yield f"type {index}", place, 4
        for field in _value(data, f"value {index}", kind, place + 4):
            yield field
            place = field[1] + field[2]
    for index in range(tensors):
        name, place = _string(data, place)
        dimensions = struct.unpack_from("<I", data, place)[0]
        yield from ((f"name length {index}", name[0] - 8, 8), (f"name {index}", *name))
        yield f"dimensions {index}", place, 4
        yield from ((f"length {index} {axis}", place + 4 + 8 * axis, 8) for axis in range(dimensions))
        place += 4 + 8 * dimensions
        yield from ((f"kind {index}", place, 4), (f"offset {index}", place + 4, 8))
        place += 12


def _string(data: bytes, place: int) -> tuple[tuple[int, int], int]:
    """Where the characters of a string lie, and where it ends."""
    size = struct.unpack_from("<Q", data, place)[0]
    return (place + 8, size), place + 8 + size


def _value(data: bytes, label: str, kind: int, place: int) -> Iterator[Field]:
    if kind == STRING:
        text, _ = _string(data, place)
        yield from ((f"{label} length", place, 8), (label, *text))
    elif kind == ARRAY:
        inner, count = struct.unpack_from("<IQ", data, place)
        yield from ((f"{label} type", place, 4), (f"{label} count", place + 4, 8))
        place += 12
        for _ in range(count):
            for field in _value(data, f"{label} element", inner, place):
                yield field
                place = field[1] + field[2]
    else:
        yield label, place, SIZES[kind]


def field(data: bytes, seed: str) -> bytes:
    """A number of the metadata or of a tensor's record becomes another one, a string other characters."""
    _, place, size = choose(seed, list(gguf_fields(data)))
    number = choose(seed, NUMBERS) % 256**size if size in (1, 2, 4, 8) else 0
    new = number.to_bytes(size, "little") if size in (1, 2, 4, 8) else generator(seed).randbytes(size)
    return data[:place] + new + data[place + size :]


def count(data: bytes, seed: str) -> bytes:
    """A count, a length or a size becomes huge or zero."""
    sizes = [
        each for each in gguf_fields(data) if any(word in each[0] for word in ("length", "count", "tensors", "entries"))
    ]
    _, place, size = choose(seed, sizes)
    return data[:place] + choose(seed, NUMBERS).to_bytes(8, "little")[:size] + data[place + size :]


def metadata_number(data: bytes, seed: str) -> bytes:
    """A number in the metadata, such as the number of blocks or heads, becomes another one."""
    numbers = [
        each for each in gguf_fields(data) if each[0].startswith("value") and each[2] == 4 and " e" not in each[0]
    ]
    _, place, size = choose(seed, numbers)
    return data[:place] + (choose(seed, NUMBERS) % 256**size).to_bytes(size, "little") + data[place + size :]


GGUF: dict[str, Mutator] = BYTES | {"field": field, "count": count, "number": metadata_number}


# --- recipes and texts -------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)
ODD_YAML = (BOMB, "!!python/object/apply:os.system ['touch ran']\n", "\tpasses: []\n", "passes: *none\n", "? [a]\n: b\n",
            "--- a\n--- b\n", "%YAML 9.9\n---\n", "passes: !!binary x\n", "&a [*a]\n", "2001-99-99\n", "<<: 3\n")  # fmt: skip


def in_yaml(change: Callable[[Any, str], Any]) -> Mutator:
    """The change of a document as one of a recipe (JSON text is YAML but for its infinite numbers)."""

    def mutate(data: bytes, seed: str) -> bytes:
        text = dump(change(yaml.safe_load(data), seed))
        return text.replace("NaN", ".nan").replace("Infinity", ".inf").encode(errors="surrogatepass")

    return mutate


def odd(data: bytes, seed: str) -> bytes:
    """What YAML can do and a recipe never should, in front of it or alone."""
    return choose(seed, ODD_YAML).encode() + data * choose(f"{seed}+", [0, 1])


RECIPES: dict[str, Mutator] = BYTES | {name: in_yaml(change) for name, change in DOCUMENTS.items()} | {"odd": odd}


def line(data: bytes, seed: str) -> bytes:
    """One line of JSON changes."""
    lines = data.splitlines()
    index = generator(seed).randrange(len(lines))
    lines[index] = in_json(DOCUMENTS[choose(seed, sorted(DOCUMENTS))])(lines[index], seed)
    return b"\n".join(lines)


def column(data: bytes, seed: str) -> bytes:
    """A table without text, without rows, or with something else in the place of texts."""
    tables = {"numbers": {"text": [1, 2]}, "nulls": {"text": ["ab", None]}, "lists": {"text": [["ab"], ["ba"]]},
              "bytes": {"text": [b"\xff\xfe", b"ab"]}, "none": {}, "other": {"x": ["ab"]}, "empty": {"text": []},
              "two": {"x": ["ab"], "y": ["ba"]}, "allnull": {"text": [None, None]}}  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(pa.table(tables[choose(seed, sorted(tables))]), sink)
    return sink.getvalue()


TEXTS: dict[str, dict[str, Mutator]] = {
    ".txt": BYTES,
    ".jsonl": BYTES | {"line": line},
    ".parquet": BYTES | {"column": column, "end": lambda data, seed: truncate(data, seed) + data[-8:]},
}


def mutators(name: str) -> dict[str, Mutator]:
    """The changes that fit a file, by its name."""
    suffix = name[name.rfind(".") :]
    by_suffix = {".safetensors": SAFETENSORS, ".gguf": GGUF, ".json": JSON, ".yaml": RECIPES} | TEXTS
    return by_suffix[suffix]

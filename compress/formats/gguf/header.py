"""The header of a GGUF file, walked once: every length and count in it is compared with the size of the file.

The library gguf reads nothing, without an error, beyond the end of a file, so that a large count keeps it busy for hours.

magic `GGUF`, version u32, tensors u64, entries u64
entry   key string, type u32, value
string  length u64, bytes
array   type u32, count u64, values
tensor  name string, dimensions u32, that many sizes u64, type u32, offset u64
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

STRING, ARRAY = 8, 9
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value, by its type
DIMENSIONS = 4  # of a tensor at most
SWAPPED = 2**16  # the version is a multiple of it if the bytes are in the other order
NESTED = 3  # levels of arrays at most


def check_header(file: Path) -> None:
    """Raise `ValueError` if the header of the GGUF `file` states more than the file holds."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        header = _Header(stream, file.stat().st_size)
        if header.number(4) % SWAPPED == 0:
            header.order = ">"
        tensors, entries = header.number(8), header.number(8)
        for _ in range(entries):
            header.skip_string()
            header.skip_value(header.number(4))
        for _ in range(tensors):
            header.skip_string()
            dimensions = header.number(4)
            if dimensions > DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            header.skip(8 * dimensions + 12)


@dataclass
class _Header:
    """A file of `size` bytes that is read from its start; `order` is that of the bytes of a number, as struct has it."""

    stream: BinaryIO
    size: int
    order: str = "<"

    def number(self, count: int) -> int:
        """The next `count` bytes, 4 or 8, as an unsigned number."""
        found = self.stream.read(count)
        if len(found) < count:
            raise ValueError(f"its header is cut off after {self.size:,} bytes")
        return int(struct.unpack(f"{self.order}{'I' if count == 4 else 'Q'}", found)[0])

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        here = self.stream.tell()
        if count > self.size - here:
            raise ValueError(f"its header states {count:,} bytes at byte {here:,}, and the file has {self.size:,}")
        self.stream.seek(count, 1)

    def skip_string(self) -> None:
        """Pass over a length and that many bytes."""
        self.skip(self.number(8))

    def skip_value(self, kind: int, level: int = 0) -> None:
        """Pass over a value of a type."""
        if kind in BYTES:
            self.skip(BYTES[kind])
        elif kind == STRING:
            self.skip_string()
        elif kind == ARRAY and level < NESTED:
            inner, count = self.number(4), self.number(8)
            if inner in BYTES:
                self.skip(count * BYTES[inner])
            else:
                for _ in range(count):
                    self.skip_value(inner, level + 1)
        else:
            raise ValueError(f"a value of type {kind}")

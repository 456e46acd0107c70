"""safetensors files: headers, exact sizes, and streamed writing.

A file consists of an 8-byte little-endian header length, a JSON header with every tensor's dtype, shape and byte range, and
the bytes. The files are written here rather than by the library, because sizes must be known before any tensor exists, and
shards must be assembled without holding them in memory.
"""

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import CompressError, StorageError
from ...recipes.parsing import parse_json, readable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 4 * 2**30
CHUNK = 16 * 2**20
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}
MOST_HEADER = 100_000_000  # bytes, the limit of the safetensors library


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (by the format's name) and shape of a tensor on disk."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """The spec of a tensor in memory."""
        return cls(NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in memory."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor on disk: `start` is the offset of its first byte in `file`."""

    file: Path
    spec: TensorSpec
    start: int

    def read(self) -> Tensor:
        """The tensor, read into new memory (pages of a memory map would count as memory of the process).

        Raises `CompressError` if the file is truncated.
        """
        buffer = torch.empty(self.spec.nbytes, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.start)
            if self.spec.nbytes and file.readinto(buffer.numpy().data) != self.spec.nbytes:
                raise _truncated(self.file)
        return buffer.view(self.spec.torch_dtype).reshape(self.spec.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, as the safetensors library accepts them.

    Raises `CompressError` if the file is truncated or is not a safetensors file, and `UsageError` if it cannot be read.
    """
    with readable(file), file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise _truncated(file)
        if length > MOST_HEADER:
            raise CompressError(
                f"{file} has a header of {length:,} bytes; {MOST_HEADER:,} are allowed", "download it again"
            )
        text = stream.read(length)
    try:
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        _check_metadata(header.pop("__metadata__", {}))
        entries = {name: _entry(file, e, 8 + length) for name, e in header.items()}
        _check_layout(entries, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{file} is not a safetensors file ({error})", "download it again") from error
    end = max((t.start + t.spec.nbytes for t in entries.values()), default=8 + length)
    if end > size:
        raise _truncated(file)
    if end < size:
        raise CompressError(f"{file} has {size - end:,} bytes after its last tensor", "download it again")
    return entries


def _check_metadata(metadata: object) -> None:
    pairs = metadata.items() if isinstance(metadata, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, str) for name, value in pairs):
        raise ValueError("__metadata__ is not an object of strings")


def _entry(file: Path, entry: dict[str, Any], data: int) -> StoredTensor:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype}")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)):
        raise ValueError(f"shape {shape} and byte range {start}..{stop} must be whole numbers from 0 to 2**63 - 1")
    spec = TensorSpec(dtype, tuple(shape))
    if stop - start != spec.nbytes:
        raise ValueError(f"{spec} needs {spec.nbytes} bytes, but its byte range is {start}..{stop}")
    return StoredTensor(file, spec, data + start)


def _check_layout(entries: Mapping[str, StoredTensor], data: int) -> None:
    """Raise `ValueError` if two tensors share bytes, or if bytes from offset `data` on belong to none."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].spec.nbytes))
    end, before = data, "the header"
    for name, tensor in ordered:
        if tensor.start != end:
            words = f"{before} and {name} overlap" if tensor.start < end else f"bytes before {name} belong to no tensor"
            raise ValueError(words)
        end, before = end + tensor.spec.nbytes, name


def _truncated(file: Path) -> CompressError:
    return CompressError(f"{file} is truncated: it ends after {file.stat().st_size:,} bytes", "download it again")


def read(file: Path) -> dict[str, Tensor]:
    """All tensors of one file, by name."""
    return {name: stored.read() for name, stored in read_header(file).items()}


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file, completely or not at all. Raises `StorageError` if the disk is full or not writable."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    with storage_errors(file), _atomic_file(file) as stream:
        stream.write(_header(specs))
        for name in _order(specs):
            stream.write(_bytes(tensors[name]))


@contextmanager
def streamed(folder: Path, specs: Mapping[str, TensorSpec]) -> Iterator[Callable[[str, Tensor], None]]:
    """Write the shards of `folder`, laid out in advance by `specs`: yields `put(name, tensor)`.

    `put` must be called once per tensor, in any order; it writes the bytes immediately and keeps nothing in memory. Raises
    `StorageError` if the disk is full or not writable, and `CompressError` if a tensor differs from its spec or is missing.
    """
    shards = arrange(specs)
    pending: dict[str, tuple[BinaryIO, int]] = {}  # file and offset of each tensor that is not written yet

    def put(name: str, tensor: Tensor) -> None:
        if TensorSpec.of(tensor) != specs[name]:
            raise CompressError(f"{name} is {TensorSpec.of(tensor)}, planned was {specs[name]}", "report this bug")
        stream, start = pending.pop(name)
        stream.seek(start)
        stream.write(_bytes(tensor))

    with storage_errors(folder), ExitStack() as files:
        for number, shard in enumerate(shards, start=1):
            stream = files.enter_context(_atomic_file(folder / _file_name(number, len(shards))))
            position = stream.write(_header(shard))
            for name in _order(shard):
                pending[name] = (stream, position)
                position += shard[name].nbytes
        yield put
        if pending:
            raise CompressError(f"{next(iter(pending))} was never written to {folder}", "report this bug")
        _write_index(folder, shards)


def assemble(parts: Iterable[Path], folder: Path, renamed: Mapping[str, str] = MappingProxyType({})) -> None:
    """Copy the tensors of all `parts` into the shards of `folder`, with an index if there are several shards.

    `renamed` maps names in the parts to names in the shards. Raises `StorageError` if the disk is full or not writable.
    """
    stored = {renamed.get(name, name): tensor for part in parts for name, tensor in read_header(part).items()}
    shards = arrange({name: tensor.spec for name, tensor in stored.items()})
    for number, specs in enumerate(shards, start=1):
        with storage_errors(folder), _atomic_file(folder / _file_name(number, len(shards))) as stream:
            stream.write(_header(specs))
            for tensor in _order(specs):
                _copy(stored[tensor], stream)
    _write_index(folder, shards)


def arrange(specs: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    """Distribute tensors over shards of at most `SHARD_BYTES`, in natural order of their names."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name in sorted(specs, key=_natural):
        size = specs[name].nbytes
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = specs[name]
        filled += size
    return shards


def nbytes(specs: Mapping[str, TensorSpec]) -> int:
    """The exact size of the weight files that `assemble` makes of tensors with these specs."""
    return sum(len(_header(shard)) + sum(s.nbytes for s in shard.values()) for shard in arrange(specs))


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise `StorageError` in place of any `OSError` of writing to `path`, with the name of the file that the error names."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    refused = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
    refused |= {errno.ELOOP, errno.ENAMETOOLONG}
    try:
        yield
    except OSError as error:
        again = "repeat the same command: it continues where it stopped"
        file, reason = error.filename or path, error.strerror or error
        if error.errno in full:
            message = f"the disk is full: {file} could not be written ({reason})"
            raise StorageError(message, f"free some space and {again}") from error
        if error.errno in refused:
            raise StorageError(f"{file} cannot be written ({reason})", "choose another -o") from error
        raise StorageError(f"{file} could not be written ({reason})", f"check the disk and {again}") from error


def write_text(file: Path, text: str) -> None:
    """Write a text file, completely or not at all. Raises `StorageError` if the disk is full or not writable."""
    with storage_errors(file), _atomic_file(file) as stream:
        stream.write(text.encode())


def _write_index(folder: Path, shards: list[dict[str, TensorSpec]]) -> None:
    """Write the index of tensors to shards, if there are several shards."""
    if len(shards) == 1:
        return
    weight_map = {name: _file_name(number, len(shards)) for number, specs in enumerate(shards, 1) for name in specs}
    total = sum(spec.nbytes for specs in shards for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": METADATA}
    position = 0
    for name in _order(specs):
        spec = specs[name]
        offsets = [position, position + spec.nbytes]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return struct.pack("<Q", len(text)) + text


def _order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names in file order: wide dtypes first, so that every tensor is aligned; then by name."""
    return sorted(specs, key=lambda name: (-specs[name].torch_dtype.itemsize, _natural(name)))


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key: `layers.10` comes after `layers.9`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


@contextmanager
def _atomic_file(file: Path) -> Iterator[BinaryIO]:
    """A stream into `file.partial`, which is renamed to `file` once everything is written."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        with suppress(OSError):  # the error that is on its way counts
            partial.unlink(missing_ok=True)
        raise


def _copy(tensor: StoredTensor, stream: BinaryIO) -> None:
    left = tensor.spec.nbytes
    with tensor.file.open("rb") as source:
        source.seek(tensor.start)
        while left:
            chunk = source.read(min(CHUNK, left))
            if not chunk:
                raise _truncated(tensor.file)
            stream.write(chunk)
            left -= len(chunk)

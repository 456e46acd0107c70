"""Written safetensors files against the library's, exact sizes, and invalid files."""

import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmpress.calibrate.model import safetensors_io
from lmpress.calibrate.model.safetensors_io import DTYPES, INDEX, TensorSpec
from lmpress.errors import CompressError, StorageError


def tensors() -> dict[str, Tensor]:
    """Tensors of every dtype of the format, with odd sizes, a scalar, an empty and a transposed one."""
    generator = torch.Generator().manual_seed(0)
    found = {f"dtype.{name}": (4 * torch.randn(3, 5, generator=generator)).to(dtype) for name, dtype in DTYPES.items()}
    return found | {
        "layers.10.w": torch.arange(7, dtype=torch.uint8),
        "layers.9.w": torch.arange(6.0).view(2, 3).T,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bytes."""
    raw = [
        {n: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist()) for n, t in each.items()}
        for each in (ours, theirs)
    ]
    return raw[0] == raw[1]


def safetensors_file(file: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def test_the_library_reads_written_files(tmp_path: Path) -> None:
    safetensors_io.write(tmp_path / "ours.safetensors", tensors())
    assert same(load_file(tmp_path / "ours.safetensors"), tensors())
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(contiguous, tmp_path / "theirs.safetensors")
    assert same(safetensors_io.read(tmp_path / "theirs.safetensors"), contiguous)


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    safetensors_io.write(tmp_path / "x.safetensors", tensors())
    stored = safetensors_io.read_header(tmp_path / "x.safetensors").values()
    assert all(each.start % each.spec.torch_dtype.itemsize == 0 for each in stored)


@pytest.mark.parametrize("limit", [1, 40, 100, 10**9])
def test_predicted_bytes_are_the_bytes_and_shards_stay_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int
) -> None:
    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", limit)
    names = sorted(tensors())
    safetensors_io.write(tmp_path / "a.safetensors", {name: tensors()[name] for name in names[::2]})
    safetensors_io.write(tmp_path / "b.safetensors", {name: tensors()[name] for name in names[1::2]})
    out = tmp_path / "out"
    out.mkdir()
    safetensors_io.assemble([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], out)
    files = sorted(out.glob("*.safetensors"))
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors().items()}
    assert sum(file.stat().st_size for file in files) == safetensors_io.nbytes(specs)
    assert same({name: t for file in files for name, t in load_file(file).items()}, tensors())
    for file in files:
        held = [each.spec.nbytes for each in safetensors_io.read_header(file).values()]
        assert sum(held) <= limit or sum(size > 0 for size in held) == 1
    assert (out / INDEX).exists() == (len(files) > 1) == (limit < 10**9)
    if len(files) > 1:
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"] == {"total_size": sum(spec.nbytes for spec in specs.values())}
        assert index["weight_map"] == {name: file.name for file in files for name in safetensors_io.read_header(file)}
        assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"


def test_shards_are_filled_in_natural_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", 2)
    specs = {f"layers.{i}.w": TensorSpec("U8", (1,)) for i in (10, 2, 1, 9)}
    assert [list(shard) for shard in safetensors_io.arrange(specs)] == [
        ["layers.1.w", "layers.2.w"],
        ["layers.9.w", "layers.10.w"],
    ]


@pytest.mark.parametrize("left", [0, 1, 7, 8, 20, -8, -1])
def test_truncated_files_are_reported_as_truncated(tmp_path: Path, left: int) -> None:
    file = tmp_path / "x.safetensors"
    safetensors_io.write(file, {"w": torch.arange(100)})
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CompressError, match=r"x\.safetensors is truncated.*download it again"):
        safetensors_io.read_header(file)


def test_a_file_cut_after_its_header_was_read_is_reported_as_truncated(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    safetensors_io.write(file, {"w": torch.arange(100)})
    stored = safetensors_io.read_header(file)["w"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CompressError, match="is truncated"):
        stored.read()
    with pytest.raises(CompressError, match="is truncated"):
        safetensors_io.assemble([file], tmp_path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"garbage, not JSON at all", b""),
        (b"\xff\xfe\x00\x01\x02\x03", b""),
        ([1, 2, 3], b""),
        ({"w": 5}, b""),
        ({"w": {"dtype": "U8", "shape": [2]}}, b"ab"),
        ({"w": entry(0, 2, dtype="F13")}, b"ab"),
        ({"w": entry(0, 2, shape=[3])}, b"ab"),
        ({"w": entry(0, 2, shape=[-1, -2])}, b"ab"),
        ({"w": entry(0, 2, shape=["a"])}, b"ab"),
        ({"w": entry(-2, 0)}, b"ab"),
        ({"v": entry(0, 4), "w": entry(2, 6)}, b"abcdef"),
        ({"v": entry(0, 4), "w": entry(0, 4)}, b"abcd"),
        ({"w": entry(0, 2) | {"data_offsets": [0.0, 2.0]}}, b"ab"),
        ({"w": entry(0, 2, shape=[2.0])}, b"ab"),  # type: ignore[list-item]
        ({"w": entry(0, 2, shape=[True, 2])}, b"ab"),
        ({"w": entry(0, 0, shape=[0, 2**63])}, b""),
        ({"v": entry(0, 2), "w": entry(3, 5)}, b"abcde"),
        ({"w": entry(1, 3)}, b"abc"),
        ({"w": entry(0, 2), "__metadata__": {"format": 1}}, b"ab"),
        ({"w": entry(0, 2), "__metadata__": []}, b"ab"),
        (b'{"w": 1, "w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', b"ab"),
        (b'{"__metadata__": {"a": "b"}, "__metadata__": {"a": "b"}}', b""),
        (b"[" * 50_000 + b"]" * 50_000, b""),
    ],
)
def test_inconsistent_headers_are_refused(tmp_path: Path, header: object, data: bytes) -> None:
    file = safetensors_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CompressError, match=r"x\.safetensors is not a safetensors file"):
        safetensors_io.read_header(file)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    file = safetensors_file(tmp_path / "x.safetensors", {"w": entry(0, 2)}, b"abc")
    with pytest.raises(CompressError, match=r"x\.safetensors has 1 bytes after its last tensor"):
        safetensors_io.read_header(file)


def test_a_header_above_the_librarys_limit_is_never_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = safetensors_file(tmp_path / "x.safetensors", {"w": entry(0, 2)}, b"ab")
    monkeypatch.setattr(safetensors_io, "MOST_HEADER", 20)
    with pytest.raises(CompressError, match=r"x\.safetensors has a header of \d+ bytes; 20 are allowed"):
        safetensors_io.read_header(file)


def test_a_header_larger_than_the_file_is_never_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CompressError, match="is truncated"):
        safetensors_io.read_header(file)


class FullDisk:
    """A stream that accepts `room` bytes."""

    def __init__(self, stream: Any, room: int) -> None:
        self.stream, self.room = stream, room

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()

    def write(self, data: Any) -> None:
        if len(data) > self.room:
            self.stream.write(bytes(data)[: self.room])
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        self.stream.write(data)


@pytest.mark.parametrize("room", [0, 5, 500, 900])
def test_no_incomplete_file_remains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int) -> None:
    good, file = {"w": torch.arange(100)}, tmp_path / "x.safetensors"
    safetensors_io.write(tmp_path / "part.safetensors", good)
    plain = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *a: FullDisk(plain(self, mode), room) if "w" in mode else plain(self, mode)
    )
    with pytest.raises(StorageError, match=r"the disk is full: .*x\.safetensors.*the same command"):
        safetensors_io.write(file, good)
    with pytest.raises(StorageError, match="the disk is full"):
        safetensors_io.assemble([tmp_path / "part.safetensors"], tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["part.safetensors"]


def test_a_failed_write_keeps_the_older_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    safetensors_io.write(file, {"w": torch.arange(3)})

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(StorageError, match=r"x\.safetensors could not be written \(Input/output error\)"):
        safetensors_io.write(file, {"w": torch.arange(9)})
    assert safetensors_io.read(file)["w"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [file]

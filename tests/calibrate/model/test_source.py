"""Opening a model directory: the files that are read, and errors for folders that are not one."""

import json
import struct
from pathlib import Path

import pytest
import torch

from lmpress.calibrate.model import safetensors_io
from lmpress.compress.formats.source import open_source
from lmpress.errors import CompressError, UsageError

WEIGHTS = "model.safetensors"


def sharded(folder: Path) -> None:
    """Split the weights of `folder` over several files with an index."""
    (folder / WEIGHTS).rename(folder / "whole")
    limit, safetensors_io.SHARD_BYTES = safetensors_io.SHARD_BYTES, 2000
    try:
        safetensors_io.assemble([folder / "whole"], folder)
    finally:
        safetensors_io.SHARD_BYTES = limit
    (folder / "whole").unlink()


def test_a_sharded_model_is_the_same_model(tiny: Path) -> None:
    whole = {name: tensor.read() for name, tensor in open_source(tiny).tensors.items()}
    sharded(tiny)
    source = open_source(tiny)
    assert len(list(tiny.glob("*.safetensors"))) > 3
    assert source.tensors.keys() == whole.keys()
    assert all(torch.equal(source.read(name), whole[name]) for name in whole)
    assert source.nbytes == sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert source.name == "tiny" and source.config["model_type"] == "llama"


def test_files_that_the_index_does_not_name_are_not_read(tiny: Path) -> None:
    sharded(tiny)
    safetensors_io.write(tiny / "adapter.safetensors", {"extra": torch.ones(2)})
    assert "extra" not in open_source(tiny).tensors


def test_the_fingerprint_follows_every_byte(tiny: Path) -> None:
    first = open_source(tiny).fingerprint
    assert open_source(tiny).fingerprint == first
    data = bytearray((tiny / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (tiny / WEIGHTS).write_bytes(data)
    second = open_source(tiny).fingerprint
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert len({first, second, open_source(tiny).fingerprint}) == 3


def test_companions_are_copied_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "LICENSE.txt", "chat_template.jinja", "notes.txt", "modeling_evil.py"):
        (tiny / name).write_text(name)
    (tmp_path / "out").mkdir()
    open_source(tiny).copy_companions(tmp_path / "out")
    copied = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    kept = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert copied.keys() == kept | {"vocab.json", "merges.txt", "LICENSE.txt", "chat_template.jinja"}
    assert all((tiny / name).read_bytes() == data for name, data in copied.items())


@pytest.mark.parametrize("model", ["nowhere", "./no/where", "/no/where", "~/model", "a/b/c", "org/"])
def test_no_such_directory(model: str) -> None:
    with pytest.raises(UsageError, match=f"{model}: no such directory; give a local model directory"):
        open_source(model)


def test_folders_that_are_not_model_directories(tiny: Path) -> None:
    with pytest.raises(UsageError, match="is a file; give the directory"):
        open_source(tiny / WEIGHTS)
    (tiny / WEIGHTS).rename(tiny / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"has only pytorch_model\.bin; safetensors files are required"):
        open_source(tiny)
    (tiny / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match="has no weights"):
        open_source(tiny)
    (tiny / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json"):
        open_source(tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b"\xff\xff", "is not valid JSON"),
        (b"", "JSON"),
        (b"[" * 50_000 + b"]" * 50_000, "nested more than"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    ],
)
def test_damaged_configs(tiny: Path, content: bytes, message: str) -> None:
    (tiny / "config.json").write_bytes(content)
    with pytest.raises(CompressError, match=rf"config\.json {message}|config\.json .*{message}"):
        open_source(tiny)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}'])
def test_damaged_indexes(tiny: Path, content: str) -> None:
    (tiny / safetensors_io.INDEX).write_text(content)
    with pytest.raises(
        CompressError, match=r"is not a valid index of weight files|is not valid JSON|is not a JSON object"
    ):
        open_source(tiny)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_cannot_list_files_outside_its_folder(tiny: Path, name: str) -> None:
    (tiny / safetensors_io.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CompressError, match="a file outside its folder; do not trust"):
        open_source(tiny)


def test_a_shard_that_is_missing_or_cut_is_named(tiny: Path) -> None:
    sharded(tiny)
    second = sorted(tiny.glob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-3])
    with pytest.raises(CompressError, match=f"{second.name} is truncated"):
        open_source(tiny)
    second.unlink()
    with pytest.raises(CompressError, match=f"lacks {second.name}, listed in its index"):
        open_source(tiny)


def test_garbage_weights_are_named(tiny: Path) -> None:
    (tiny / WEIGHTS).write_bytes(struct.pack("<Q", 10) + b"not json!!" + b"x" * 50)
    with pytest.raises(CompressError, match=rf"{WEIGHTS} is not a safetensors file"):
        open_source(tiny)

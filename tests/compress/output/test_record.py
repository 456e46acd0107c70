"""Checksums: every flipped bit is found, named, and only then."""

import json
from pathlib import Path

import pytest

import lmpress
from lmpress.compress.output.record import RECORD, check, digests
from lmpress.errors import CompressError, UsageError
from lmpress.eval.inspect import inspect
from lmpress.eval.tables import verification
from lmpress.eval.verify import Verification, verify


@pytest.fixture
def packed(tiny: Path, tmp_path: Path) -> Path:
    lmpress.quantize(tiny, tmp_path / "packed", method="rtn", group_size=8)
    return tmp_path / "packed"


def test_the_record_lists_files_and_tensors(packed: Path) -> None:
    record = json.loads((packed / RECORD).read_text())
    whole, tensors = digests(packed / "model.safetensors")
    assert record["files"] == {"model.safetensors": whole} and record["tensors"] == tensors
    assert len(tensors) > 20 and check(packed) and inspect(packed).checked
    assert lmpress.load(packed, check=True) is not None


def test_one_flipped_bit_is_found_and_its_tensor_named(packed: Path) -> None:
    file = packed / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    last = max(lmpress.compress.formats.source.open_source(packed).tensors.items(), key=lambda item: item[1].start)[0]
    for read in (check, inspect, verify, lambda path: lmpress.load(path, check=True)):
        with pytest.raises(CompressError, match=f"damaged.*first in the tensor {last}"):
            read(packed)


def test_a_missing_file_is_damage(packed: Path) -> None:
    record = json.loads((packed / RECORD).read_text())
    record["files"]["model-2.safetensors"] = "0"
    (packed / RECORD).write_text(json.dumps(record))
    with pytest.raises(CompressError, match=r"model-2\.safetensors is missing"):
        check(packed)


def test_without_a_record_nothing_is_claimed(tiny: Path) -> None:
    assert not check(tiny) and not inspect(tiny).checked
    with pytest.raises(UsageError, match=r"no lmpress\.json to check against"):
        lmpress.load(tiny, check=True)


def test_verify_alone_says_that_it_checks_integrity_only() -> None:
    words = {
        itself: " ".join(str(verification(Verification("c", "c", (), None, itself, True)).caption).split())
        for itself in (True, False)
    }
    assert "only the integrity" in words[True] and "integrity" not in words[False]

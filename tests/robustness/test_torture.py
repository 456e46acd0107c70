"""Kills and failing disks: after them the same command ends with the same bytes, but for the known points."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def test_fixed_points_end_as_the_table_says() -> None:
    table = FOLDER / "torture_known.json"
    done = subprocess.run(
        [sys.executable, FOLDER / "torture.py", "--fixed", table], capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["cases"] >= 20
    assert found["differences"] == {}


def write_files(root: Path) -> int:
    """Six ways to the disk, the last of them caught."""
    import os
    import shutil

    folder = root / "folder"
    folder.mkdir()
    with (folder / "a").open("wb") as file:
        file.write(b"0123456789")
        file.flush()
        os.fsync(file.fileno())
    (folder / "a").rename(folder / "b")
    shutil.rmtree(folder)
    return 0


OPERATIONS = ["mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"]


@pytest.fixture
def disturbed(helper, tmp_path: Path):
    """Runs `write_files` on a disk that ends at an operation; the outcome and what lies there then."""
    children, disk = helper("children"), helper("disk")

    def run(end: str, at: int):
        root = tmp_path / f"{end}-{at}"
        (root / "data").mkdir(parents=True)

        def act() -> int:
            counted = disk.Disk(root / "data", end, at)
            disk.install(counted)
            code = write_files(root / "data")
            print(*[kind for kind, _ in counted.operations])
            return code

        outcome = children.run_child(act, root)
        return outcome, {path.name: path.read_bytes() for path in (root / "data").rglob("*") if path.is_file()}

    return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # other tests' threads are of no concern to the child
class TestDisk:
    def test_every_operation_is_counted(self, disturbed) -> None:
        outcome, left = disturbed("kill", -1)
        assert (outcome.code, outcome.stdout.split(), left) == (0, OPERATIONS, {})

    @pytest.mark.parametrize("at", range(7), ids=OPERATIONS)
    def test_a_kill_comes_before_its_operation_and_tears_a_write(self, disturbed, at: int) -> None:
        outcome, left = disturbed("kill", at)
        assert outcome.code == -9
        expected = [{}, {}, {"a": b"01234"}, {"a": b"0123456789"}, {"a": b"0123456789"}, {"b": b"0123456789"}, {}]
        assert left == expected[at]

    @pytest.mark.parametrize("at", range(7), ids=OPERATIONS)
    @pytest.mark.parametrize(("end", "word"), [("eio", "[Errno 5]"), ("enospc", "[Errno 28]")], ids=["eio", "enospc"])
    def test_a_failure_is_raised_as_the_system_would(self, disturbed, end: str, word: str, at: int) -> None:
        outcome, _ = disturbed(end, at)
        fails = end == "eio" or at < 4  # a full disk lets names change and files go
        assert outcome.code == int(fails)
        assert (word in outcome.stderr) == fails

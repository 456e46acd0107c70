"""Kills and failing disks: after them the same command ends with the same bytes, but for the known points."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def test_fixed_points_fail_as_listed_and_no_others() -> None:
    table = FOLDER / "torture_known.json"
    done = subprocess.run(
        [sys.executable, FOLDER / "torture.py", "--fixed", table], capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["cases"] >= 20
    assert found["differences"] == {}


@pytest.fixture
def base(helper):
    """A run of four operations that writes two files, one of them with the time in it."""
    operations = [("open", ".out/a.partial"), ("rename", ".out/a.partial"), ("rename", ".out"), ("unlink", "rest")]
    return helper("torture").Undisturbed(0, operations, {"a": b"1", "time": b"2"}, {"time"})


@pytest.mark.parametrize(
    ("files", "code", "stderr", "expected"),
    [
        ({"out/a": "1", "out/time": "3", "out.log": ""}, 0, "", []),
        ({"out/a": "x", "out/time": "2"}, 0, "", ["repeated: other bytes in a"]),
        ({"out/a": "1", "out/b": "1"}, 0, "", ["repeated: other bytes in b"]),
        ({"out/a": "1", ".out.partial/a": "1"}, 0, "", ["left behind: .out.partial"]),
        ({"out/a": "1"}, 2, "error: /x/y/out exists", ["repeated: exit code 2: error: out exists"]),
    ],
    ids=["equal", "other", "more", "rest", "refused"],
)
def test_a_repetition_is_judged(
    helper, base, tmp_path: Path, files: dict[str, str], code: int, stderr: str, expected: list[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    outcome = helper("children").Outcome(code, "", stderr, 1.0, 1)
    assert helper("torture").judged_repetition(outcome, base, tmp_path) == expected


@pytest.mark.parametrize(("number", "at"), [("0", 0), ("0%", 0), ("50%", 2), ("99%", 3), ("100%", 3), ("named", 3)])
def test_points_are_numbers_shares_or_the_one_behind_the_name(helper, base, number: str, at: int) -> None:
    assert helper("torture").resolve(number, base) == at


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

"""The log of a run: never through a link, and a failing disk is one warning."""

import logging
from pathlib import Path

import pytest

from lmpress.compress.command.log import LogFile, log_to
from lmpress.errors import UsageError


def test_lines_are_appended(tmp_path: Path) -> None:
    for word in ("one", "two"):
        with log_to(tmp_path / "a/out.log", pytest.fail) as log:
            log.info(word)
    assert [line.split()[-1] for line in (tmp_path / "a/out.log").read_text().splitlines()] == ["one", "two"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out.log").symlink_to(tmp_path / "victim")
    with pytest.raises(UsageError, match="not a regular file"), log_to(tmp_path / "out.log", pytest.fail):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_failing_disk_is_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    warnings: list[str] = []
    with Path("/dev/full").open("w") as full:
        handler = LogFile(full, warnings.append)
        for _ in range(3):
            handler.handle(logging.LogRecord("x", logging.INFO, "f", 1, "line", (), None))
        handler.close()
    assert len(warnings) == 1 and "/dev/full could not be written (No space left on device)" in warnings[0]
    assert capsys.readouterr().err == ""

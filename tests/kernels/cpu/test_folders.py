"""The folder of compiled kernels: no other user can change it; a temporary one serves if the cache cannot be used."""

import logging
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from lmpress.kernels.cpu import folders
from lmpress.kernels.kernel import Unavailable


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and an empty folder for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders._warn_once.cache_clear()


def falls_back(caplog: pytest.LogCaptureFixture, reason: str) -> bool:
    """Whether the temporary folder serves, and the reason is given once."""
    with caplog.at_level(logging.WARNING):
        found = [folders.private_folder() for _ in range(2)]
    (message,) = caplog.messages
    assert reason in message and f"kept in {folders.temporary_folder()} instead" in message
    return found == [folders.temporary_folder()] * 2


def test_only_the_user_may_open_it(tmp_path: Path) -> None:
    found = folders.private_folder()
    assert found == tmp_path / "cache" / "lmpress" / "kernels"
    assert [path.stat().st_mode & 0o777 for path in (found, found.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o755])
def test_a_folder_open_to_others_is_not_used(caplog: pytest.LogCaptureFixture, mode: int) -> None:
    folders.private_folder().chmod(mode)
    assert falls_back(caplog, "kernels is open to other users")


@pytest.mark.parametrize("name", ["cache/lmpress", "cache"])
def test_a_folder_that_others_can_replace_is_not_used(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, name: str
) -> None:
    folders.private_folder()
    (tmp_path / name).chmod(0o777)
    assert falls_back(caplog, f"{name}, above the cache folder, is open to other users")
    (tmp_path / name).chmod(0o1777)  # sticky: only its owner replaces a file
    assert folders.private_folder() == folders.cache_folder()


def test_what_a_link_on_the_way_leads_to_is_checked_too(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "open" / "cache").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "cache").symlink_to(tmp_path / "open" / "cache")
    assert falls_back(caplog, "open, above the cache folder, is open to other users")


def test_a_linked_folder_is_not_used(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folders.cache_folder().parent.mkdir(parents=True)
    folders.cache_folder().symlink_to(tmp_path / "elsewhere")
    assert falls_back(caplog, "kernels is open to other users")


def test_a_file_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "library.so"
    path.touch(mode=0o700)
    folders.check_private(path)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(Unavailable, match="open to other users"):
        folders.check_private(path)


def test_a_cache_that_cannot_be_created(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert falls_back(caplog, "cannot be created")


def test_a_cache_that_cannot_be_written(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, access = folders.private_folder(), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != wanted and access(path, mode))
    assert falls_back(caplog, "kernels cannot be written")


def test_a_user_without_home_and_passwd_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert folders.private_folder() == folders.temporary_folder()


def test_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match="cannot be created"):
        folders.private_folder()

"""Equal runs write equal folders, for every command; with another number of threads the weights of rounding stay equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.compress.chain import run as run_chain
from lmpress.recipes import chain

GPTQ = {"method": "gptq", "group_size": 8, "samples": 8, "seq_len": 16}
TAUGHT = {"drop": 0.5, "choice": "spread", "samples": 16, "seq_len": 16, "steps": 4, "batch": 4, "checks": 2}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def quantize(model: Path, out: Path, text: str) -> None:
    lmpress.quantize(model, out, calib=text, **GPTQ)


def rtn(model: Path, out: Path, text: str) -> None:
    lmpress.quantize(model, out, method="rtn", group_size=8)


def prune(model: Path, out: Path, text: str) -> None:
    lmpress.prune(model, out, sparsity=0.5, calib=text, samples=8, seq_len=16)


def distill(model: Path, out: Path, text: str) -> None:
    lmpress.distill(model, out, data=text, **TAUGHT)


def export(model: Path, out: Path, text: str) -> None:
    packed = out.parent / f"{out.name}-packed"
    rtn(model, packed, text)
    lmpress.export(packed, out, format="fp16")


def chained(model: Path, out: Path, text: str) -> None:
    weights = {"bits": 4, "symmetric": True, "strategy": "group", "group_size": 8}
    passes = [{"method": "gptq", "scheme": {"weights": weights}}]
    calibration = {"data": text, "samples": 8, "seq_len": 16}
    content: dict[str, Any] = {
        "stages": [{"distill": {"data": text, **TAUGHT}}, {"compress": {"passes": passes, "calibration": calibration}}]
    }
    run_chain(model, out, chain.build(content))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 60)
    return str(tmp_path / "text.txt")


Command = Callable[[Path, Path, str], None]


@pytest.mark.parametrize("command", [quantize, rtn, prune, distill, export, chained], ids=lambda each: each.__name__)
def test_equal_runs_write_equal_folders(tiny: Path, tmp_path: Path, text: str, command: Command) -> None:
    for name in ("one", "two"):
        command(tiny, tmp_path / name, text)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("command", [rtn, export], ids=lambda each: each.__name__)
def test_rounding_and_export_do_not_depend_on_the_threads(
    tiny: Path, tmp_path: Path, text: str, command: Command
) -> None:
    """Other commands add floating-point products, in an order that depends on the number of threads."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            command(tiny, tmp_path / str(threads), text)
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")

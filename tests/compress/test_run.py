"""A run: opened and planned once by the command and by Python; its plan is shown before the work and is kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lmpress
from lmpress.cli import app
from lmpress.compress import run as module
from lmpress.compress.plan import Plan
from lmpress.compress.run import Run
from lmpress.errors import UsageError
from lmpress.recipes.options.quantize import QuantizeOptions


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often models are opened and plans are made."""
    counts = {"open_source": 0, "make_plan": 0}

    def counting(name: str) -> Callable[..., object]:
        original = getattr(module, name)

        def call(*arguments: object) -> object:
            counts[name] += 1
            return original(*arguments)

        return call

    for name in counts:
        monkeypatch.setattr(module, name, counting(name))
    return counts


def test_the_command_opens_and_plans_once(tiny: Path, tmp_path: Path, counted: dict[str, int]) -> None:
    words = ["quantize", str(tiny), "--method", "rtn", "--group-size", "8", "-o", str(tmp_path / "out"), "--quiet"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert counted == {"open_source": 1, "make_plan": 1}


def test_python_opens_and_plans_once(tiny: Path, tmp_path: Path, counted: dict[str, int]) -> None:
    lmpress.quantize(tiny, tmp_path / "out", method="rtn", group_size=8)
    assert counted == {"open_source": 1, "make_plan": 1}


@pytest.mark.parametrize("average", [None, 6.2], ids=["bits", "budget"])
def test_the_plan_is_shown_before_the_work_and_kept(tiny: Path, tmp_path: Path, average: float | None) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh hgfedcba " * 60)
    options = QuantizeOptions(
        method="rtn", average_bits=average, group_size=8, calib=str(tmp_path / "text.txt"), samples=4, seq_len=16
    )
    run = Run.of(tiny, options.recipe(), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "text.txt"}
    assert (run.most_bytes is None) == (average is None)
    shown: list[Plan] = []
    report = run.execute(on_plan=lambda plan: shown.append(plan) if not run.out.exists() else None)
    assert shown == [report.plan]
    assert report.bytes_after == report.plan.bytes_after == (tmp_path / "out/model.safetensors").stat().st_size
    if run.most_bytes is not None:
        assert sum(layer.nbytes for layer in report.plan.layers if layer.args) <= run.most_bytes


def test_a_target_that_cannot_serve_the_result_is_refused_before_it_runs(tiny: Path) -> None:
    with pytest.raises(UsageError, match="vllm cannot serve"):
        Run.of(tiny, QuantizeOptions(method="rtn", bits=3, group_size=8).recipe(), targets=["vllm"])

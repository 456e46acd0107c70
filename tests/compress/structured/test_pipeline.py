"""`distill` stage by stage: equal to its parts run by hand; finished stages survive a kill; a refusal leaves no files."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import lmpress
from lmpress.calibrate.data.token_rows import TokenRows, calibration_rows
from lmpress.compress.formats.tokenizer import load_tokenizer
from lmpress.compress.structured.drop_layers import keep_layers
from lmpress.compress.structured.pipeline import Reduction
from lmpress.compress.structured.width import Width, prune_width
from lmpress.errors import UsageError

UNTAUGHT: dict[str, Any] = {"samples": 32, "seq_len": 16, "options": {"steps": 0}}
TAUGHT: dict[str, Any] = {"samples": 32, "seq_len": 16, "options": {"steps": 6, "batch": 4, "checks": 3}}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 60)
    return str(tmp_path / "text.txt")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("report.json", "lmpress.json")
    }


def test_layers_then_width_is_what_both_give_by_hand(tiny: Path, tmp_path: Path, text: str) -> None:
    lmpress.distill(tiny, tmp_path / "out", layers=[1], mlp_width=16, kv_heads=1, data=text, **UNTAUGHT)
    keep_layers(tiny, tmp_path / "hand1", [1])
    rows = calibration_rows(text, load_tokenizer(tiny), 32, 16, 0, split="training")
    prune_width(
        tmp_path / "hand1", tmp_path / "hand2", Width(mlp=16, kv_heads=1), TokenRows(rows.ids, "text", rows.vocabulary)
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "hand2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (len(model.model.layers), model.config.intermediate_size, model.config.num_key_value_heads) == (1, 16, 1)


def test_width_alone_with_training(tiny: Path, tmp_path: Path, text: str) -> None:
    report = lmpress.distill(tiny, tmp_path / "out", mlp_width=0.67, data=text, **TAUGHT)
    assert report.kept == [0, 1] and report.parameters_after < report.parameters_before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 16
    assert report.history.curve[0][0] == 0 and report.history.curve[0][2] > 0


def test_the_loss_curve_is_drawn_or_a_warning_is_given(
    tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str | None] = []
    words = {"mlp_width": 16, "data": text, "observer": lambda event: said.append(event.message), **TAUGHT}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lmpress.distill(tiny, tmp_path / "without", **words)
    assert not (tmp_path / "without/loss.png").exists()
    assert [line for line in said if line] == [
        "the losses were not plotted, because matplotlib is not installed: pip install lmpress[plot]"
    ]
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    lmpress.distill(tiny, tmp_path / "with", **words)
    assert (tmp_path / "with/loss.png").read_bytes().startswith(b"\x89PNG")


def test_shares_are_rounded_to_layers_and_to_whole_groups() -> None:
    assert Reduction(drop=0.25).layers_to_keep(8) == Reduction(drop=2).layers_to_keep(8) == 6
    assert Width(mlp=0.67).channels(768) == 512 and Width(mlp=0.67).channels(24) == 16
    assert Width(mlp=500).channels(768) == 500


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"drop": 1.5},
        {"drop": 0.9},
        {"drop": 1, "keep_layers": 1},
        {"drop": 1, "choice": "best"},
        {"mlp_width": 2.5},
        {"mlp_width": 99},
        {"kv_heads": 3},
        {"layers": [5]},
    ],
    ids=str,
)
def test_refusals_leave_nothing(tiny: Path, tmp_path: Path, text: str, words: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        lmpress.distill(tiny, tmp_path / "out", data=text, **words, **UNTAUGHT)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "text.txt"}


@pytest.fixture
def mixture(tmp_path: Path, letters: PreTrainedTokenizerFast, make_model: Callable[[str], PreTrainedModel]) -> Path:
    make_model("mixtral").save_pretrained(tmp_path / "mixture")
    letters.save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def test_fused_experts_are_refused_before_anything_is_trained(mixture: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"experts\.gate_up_proj in another form .*--steps 0"):
        lmpress.distill(mixture, tmp_path / "out", drop=1, data=text, **TAUGHT)
    assert {path.name for path in tmp_path.iterdir()} == {"mixture", "text.txt"}
    report = lmpress.distill(mixture, tmp_path / "out", drop=1, choice="spread", data=text, **UNTAUGHT)
    assert report.kept == [1] and len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == 1


KILLED = """
import os, signal, sys
import torch
from lmpress.compress.api import distill

torch.set_num_threads(1)
model, folder, text, *points = sys.argv[1:]
words = dict(keep_layers=1, choice="spread", mlp_width=16, data=text, samples=32, seq_len=16,
             options={"steps": 6, "batch": 4, "checks": 3})
for number, point in enumerate(points):
    def die(event):
        if point == f"{event.phase}/{event.block}":
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        distill(model, f"{folder}/{number}", observer=die, **words)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
distill(model, f"{folder}/whole", **words)
"""


def test_killed_runs_skip_finished_stages_and_end_in_the_same_bytes(tiny: Path, tmp_path: Path, text: str) -> None:
    points = ["block/0", "distill/2", "distill/6"]
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, tiny, tmp_path, text, *points],
        cwd=Path(lmpress.__file__).parent.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.split() == [str(int(signal.SIGKILL))] * len(points)
    for number, point in enumerate(points):
        work = tmp_path / f".{number}.distill"
        finished = {name for name in ("layers", "width") if (work / name).exists()}
        assert finished == ({"layers"} if point == "block/0" else {"layers", "width"})
        before = {name: (work / name / "model.safetensors").stat().st_mtime_ns for name in finished}
        seen: list[tuple[str, int]] = []

        def look(event: Any, work: Path = work, before: dict[str, int] = before, seen: Any = seen) -> None:
            seen.append((event.phase, event.block))
            if event.phase != "done":
                assert {n: (work / n / "model.safetensors").stat().st_mtime_ns for n in before} == before

        lmpress.distill(
            tiny, tmp_path / str(number), keep_layers=1, choice="spread", mlp_width=16, data=text, observer=look,
            **TAUGHT,
        )  # fmt: skip
        assert ("block", 0) in seen if point == "block/0" else ("block", 0) not in seen
        assert contents(tmp_path / str(number)) == contents(tmp_path / "whole"), point
        assert not work.exists()

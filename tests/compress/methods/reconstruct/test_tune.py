"""`--quality best`: block tuning after the method, written to the recipe, killed and resumed to the same bytes."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.compress import pipeline
from lmpress.compress.block import Block
from lmpress.compress.methods.reconstruct import tune
from lmpress.compress.methods.reconstruct.loop import Result
from lmpress.compress.methods.reconstruct.tune import Tune
from lmpress.compress.report.verdict import judge
from lmpress.recipes.naming import default_out
from lmpress.recipes.options import quantization_recipe
from lmpress.recipes.schema import Recipe, build, dump, parse, read


def names(recipe: Recipe) -> list[str]:
    return [entry.method for entry in recipe.passes]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 60)
    return str(tmp_path / "text.txt")


@pytest.fixture
def best(tmp_path: Path, text: str) -> Path:
    """The recipe of `--quality best` with fewer steps, as a file."""
    recipe = quantization_recipe(bits=2, group_size=8, quality="best", calib=text, samples=16, seq_len=16, seed=3)
    written = dump(recipe)
    assert "steps: 300" in written
    (tmp_path / "best.yaml").write_text(written.replace("steps: 300", "steps: 12").replace("rate: 0.02", "rate: 0.1"))
    return tmp_path / "best.yaml"


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("gptq", ["gptq", "tune"]),
        ("rtn", ["rtn", "tune"]),
        ("obq", ["obq", "tune"]),
        ("zeroquant", ["zeroquant", "tune"]),
        ("awq", ["awq", "rtn", "tune"]),
        ("smoothquant", ["smoothquant", "rtn", "tune"]),
        ("rotate", ["rotate", "rtn", "tune"]),
        ("spqr", ["spqr"]),
    ],
)
def test_the_best_quality_is_a_recipe_with_block_tuning(method: str, passes: list[str]) -> None:
    best = quantization_recipe(method=method, quality="best")
    assert names(best) == passes and parse(dump(best), "dumped") == best
    assert "tune" not in names(quantization_recipe(method=method, quality="balanced"))
    if "tune" in passes:
        assert best.passes[-1].config == Tune()
    assert default_out("x/model", best) == default_out("x/model", quantization_recipe(method=method))


def test_the_shipped_recipe_equals_the_flag() -> None:
    assert read("best-w4") == quantization_recipe(quality="best")
    assert read("best-w2") == quantization_recipe(bits=2, group_size=32, symmetric=False, quality="best")


def test_the_plan_does_not_depend_on_the_training(tiny: Path, tmp_path: Path, best: Path) -> None:
    trained = read(best)
    untrained = trained.model_copy(update={"passes": trained.passes[:-1]})
    assert pipeline.plan(tiny, trained).tensors == pipeline.plan(tiny, untrained).tensors
    report = lmpress.run(tiny, tmp_path / "out", best)
    assert report.bytes_after == (tmp_path / "out/model.safetensors").stat().st_size


def test_figures_of_the_solver_are_marked_as_before_training(tiny: Path, tmp_path: Path, best: Path) -> None:
    trained = lmpress.run(tiny, tmp_path / "out", best)
    recipe = read(best)
    solved = lmpress.run(tiny, tmp_path / "solved", recipe.model_copy(update={"passes": recipe.passes[:-1]}))
    first, second = trained.layers[0], solved.layers[0]
    assert not {"loss", "damped_loss", "relative_error"} & first.keys()
    assert first["loss_before_training"] == pytest.approx(float(second["loss"]), rel=1e-3)
    assert first["rtn_loss"] == pytest.approx(float(second["rtn_loss"]), rel=1e-3)
    broken = judge([layer | {"relative_error_before_training": 0.95} for layer in trained.layers])
    assert broken.word == "BROKEN"


def test_the_seed_of_the_recipe_reaches_the_training(
    tiny: Path, tmp_path: Path, best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, reconstruct = [], tune.reconstruct

    def noting(block: Block, *rest: Any) -> Result:
        seeds.append(block.seed)
        return reconstruct(block, *rest)

    monkeypatch.setattr(tune, "reconstruct", noting)
    lmpress.run(tiny, tmp_path / "out", best)
    assert seeds == [3, 3]


KILLED = """
import os, signal, sys
import torch
from lmpress.compress.api import run

torch.set_num_threads(1)
model, folder, recipe, *points = sys.argv[1:]
for point in points:
    phase, block = point.split("-")

    def die(event):
        if (event.phase, event.block) == (phase, int(block)):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        run(model, f"{folder}/{point}", recipe, observer=die)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_a_killed_training_resumes_to_the_same_bytes(tiny: Path, tmp_path: Path, best: Path) -> None:
    points = ["train-0", "write-0", "train-1", "assemble-2"]
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, tiny, tmp_path, best, *points],
        cwd=Path(lmpress.__file__).parent.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.split() == [str(int(signal.SIGKILL))] * len(points)
    lmpress.run(tiny, tmp_path / "whole", best)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    for point in points:
        assert not (tmp_path / point).exists()
        lmpress.run(tiny, tmp_path / point, best)
        assert {path.name: path.read_bytes() for path in (tmp_path / point).iterdir()} == whole, point


def test_training_uses_quantized_inputs(tiny: Path, tmp_path: Path, text: str) -> None:
    """With inputs of 3 bits: the loss before training is the one of the quantized block, with static and dynamic scales."""
    weights = {"bits": 8, "strategy": "channel", "group_size": None, "formula": "signed"}
    inputs = weights | {"bits": 3, "strategy": "token", "dynamic": True}
    losses = {}
    for name, kind in {
        "exact": None,
        "token": inputs,
        "static": inputs | {"strategy": "tensor", "dynamic": False},
    }.items():
        passes: list[Any] = [{"method": "rtn", "scheme": {"weights": weights, "inputs": kind}}]
        passes += [{"method": "tune", "steps": 30, "rate": 0.1}]
        recipe = build({"passes": passes, "calibration": {"data": text, "samples": 16, "seq_len": 16}})
        report = lmpress.run(tiny, tmp_path / name, recipe)
        losses[name] = [float(layer["block_loss_before"]) for layer in report.layers]
        assert name == "exact" or all(float(x["block_loss"]) < float(x["block_loss_before"]) for x in report.layers)
    assert all(losses["exact"][0] < losses[kind][0] / 100 for kind in ("token", "static"))


def test_lkd_recovers_a_quarter_of_the_loss_of_w4a8(assets: Path, tmp_path: Path) -> None:
    model, data = assets / "models/stories260K", assets / "data/tinystories"
    inputs = {"bits": 8, "strategy": "token", "group_size": None, "formula": "signed", "dynamic": True}
    rounded = {"method": "rtn", "scheme": {"weights": {"bits": 4, "group_size": 32}, "inputs": inputs}}
    divergence = []
    for name, passes in {"rtn": [rounded], "lkd": [rounded, {"method": "lkd", "steps": 50, "rate": 1e-3}]}.items():
        calibration = {"data": str(data / "train.jsonl"), "samples": 32, "seq_len": 128}
        lmpress.run(model, tmp_path / name, build({"passes": passes, "calibration": calibration}))
        found = lmpress.evaluate(tmp_path / name, str(data / "test.jsonl"), against=model, seq_len=128, rows=8)
        divergence.append(found.kl or 0.0)
    assert 0 < divergence[1] <= 0.75 * divergence[0]

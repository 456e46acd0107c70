"""Distillation by several processes: the student equals that of one process and is written once; uneven shares are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmpress
from lmpress.calibrate.model import safetensors_io

WORDS = "--keep-layers 1 --choice spread --mlp-width 16 --samples 48 --seq-len 16 --steps 6 --checks 3 --threads 1"
TERMS = "--set hidden=1 --set attention=1 --set accumulate=2"
TOGETHER = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
# `--multi_gpu` is what makes accelerate start several; `--device` says whether they use GPUs.
BY_ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def distilled(model: Path, text: Path, out: Path, launcher: list[str], batch: int) -> subprocess.CompletedProcess[str]:
    words = [*WORDS.split(), *TERMS.split(), "--batch", str(batch), "--data", str(text), "-o", str(out)]
    command = [sys.executable, *launcher, "-m", "lmpress.cli", "distill", str(model), *words]
    root = Path(lmpress.__file__).parent.parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("launcher", [TOGETHER, BY_ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_train_the_student_that_one_does(tiny: Path, tmp_path: Path, launcher: list[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghhgfedcbaacegbdfh" * 60)
    for name, by in (("one", []), ("two", launcher)):
        done = distilled(tiny, text, tmp_path / name, by, batch=8)
        assert done.returncode == 0 and done.stderr.count("written to") == 1, done.stderr
    one, two = (safetensors_io.read(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
    histories = [json.loads((tmp_path / name / "report.json").read_text())["history"] for name in ("one", "two")]
    assert histories[0]["best_step"] == histories[1]["best_step"] > 0
    torch.testing.assert_close(*(torch.tensor(course["curve"]) for course in histories), rtol=1e-4, atol=1e-5)
    refused = distilled(tiny, text, tmp_path / "three", launcher, batch=6)
    assert refused.returncode and "2 processes cannot share 3 rows evenly" in refused.stderr
    assert not list(tmp_path.glob("*three*"))

"""Chains: the same bytes as their stages by hand, also after a kill between and inside stages; errors name the stage."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

import lmpress
from lmpress.cli import app
from lmpress.compress import export
from lmpress.compress.chain import run
from lmpress.compress.output.record import check
from lmpress.errors import CompressError, UsageError
from lmpress.recipes import chain, schema
from lmpress.recipes.options.distill import DistillOptions

OF_THE_REQUEST = {"stages.json", "lmpress.json"}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 60)
    return str(tmp_path / "text.txt")


def content(text: str) -> dict[str, Any]:
    weights = {"bits": 4, "symmetric": True, "strategy": "group", "group_size": 8}
    return {
        "stages": [
            {"distill": {"drop": 0.5, "choice": "spread", "data": text, "samples": 32, "seq_len": 16, "steps": 4,
                         "batch": 4, "checks": 2}},
            {"compress": {"passes": [{"method": "gptq", "scheme": {"weights": weights}}],
                          "calibration": {"data": text, "samples": 8, "seq_len": 16}}},
            {"export": {"format": "fp16"}},
        ]
    }  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in OF_THE_REQUEST}


KILLED = """
import json, os, signal, sys
import torch
from pathlib import Path
from lmpress.compress.chain import run
from lmpress.compress.output.record import check
from lmpress.recipes import chain

torch.set_num_threads(1)
model, folder, content, *points = sys.argv[1:]
for number, point in enumerate(points):
    def die(event):
        if point == f"{event.phase}/{event.block}":
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        run(model, Path(folder) / str(number), chain.build(json.loads(content)), observer=die)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_a_chain_is_its_stages_by_hand_also_after_a_kill(tiny: Path, tmp_path: Path, text: str) -> None:
    wanted = chain.build(content(text))
    first = wanted.stages[0]
    assert isinstance(first, DistillOptions) and isinstance(wanted.stages[1], schema.Recipe)
    lmpress.distill(tiny, tmp_path / "tiny-distill", options=first)
    lmpress.run(tmp_path / "tiny-distill", tmp_path / "tiny-distill-gptq-w4", wanted.stages[1])
    lmpress.export(tmp_path / "tiny-distill-gptq-w4", tmp_path / "hand", format="fp16")
    by_hand = contents(tmp_path / "hand")
    points = ["distill/2", "plan/0", "write/0", "done/1"]  # in the training, between stages, in the solving, between
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, tiny, tmp_path, json.dumps(content(text)), *points],
        cwd=Path(lmpress.__file__).parent.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.split() == [str(int(signal.SIGKILL))] * len(points)
    for number, point in enumerate(points):
        out, work, seen = tmp_path / str(number), tmp_path / f".{number}.chain", []
        assert not out.exists() and (work / "tiny-distill").exists() == (point != "distill/2")
        report = run(tiny, out, wanted, observer=lambda event, seen=seen: seen.append(event.phase))
        assert contents(out) == by_hand, point
        assert check(out) and "seconds" not in (out / "stages.json").read_text()
        assert ("distill" in seen, "solve" in seen) == (point == "distill/2", point != "done/1")
        assert not work.exists() and [record["stage"] for record in report.stages] == ["distill", "compress", "export"]


def test_the_command_lists_the_stages_and_writes_next_to_the_model(tiny: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "chain.json").write_text(json.dumps(content(text)))  # JSON is YAML
    words = ["run", str(tiny), "--recipe", str(tmp_path / "chain.json")]
    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0 and "stage 2: compress -> tiny-distill-gptq-w4" in dry.stderr
    assert not list(tmp_path.glob("tiny-*"))
    assert CliRunner().invoke(app, [*words, "-q"]).exit_code == 0
    assert (tmp_path / "tiny-distill-gptq-w4-fp16/model.safetensors").exists()
    refused = CliRunner().invoke(app, ["quantize", *words[1:]])
    assert refused.exit_code == 2 and "is a chain of stages" in refused.stderr


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        (0, {"distill": {"dorp": 1}}, r"stage 1 \(distill\).*dorp"),
        (0, {"distill": {"steps": -1}}, r"stage 1 \(distill\): steps must be greater than or equal to 0, got -1"),
        (1, {"compress": {"passes": [{"method": "gtpq"}]}}, r"stage 2 \(compress\).*did you mean gptq"),
        (
            2,
            {"export": {"format": "gptqq"}},
            r"stage 3 \(export\): format must be 'pack-quantized', 'gptq', .* got 'gptqq'",
        ),
        (2, {"distill": {"drop": 1}}, r"stage 3 \(distill\) cannot work on the result of stage 2"),
        (1, {"prune": {}}, "stage 2 must be one of distill, compress, export"),
    ],
)
def test_a_wrong_stage_is_named(text: str, stage: int, changes: dict[str, Any], words: str) -> None:
    wrong = content(text)
    wrong["stages"][stage] = changes
    with pytest.raises(UsageError, match=words):
        chain.build(wrong)


def test_a_failing_stage_is_named_and_earlier_stages_are_not_repeated(tiny: Path, tmp_path: Path, text: str) -> None:
    wrong, right = content(text), chain.build(content(text))
    wrong["stages"][1]["compress"]["calibration"]["data"] = str(tmp_path / "nowhere.txt")
    with pytest.raises(CompressError, match=r"stage 2 \(compress\): .*nowhere.txt"):
        run(tiny, tmp_path / "out", chain.build(wrong))
    phases: list[str] = []
    run(tiny, tmp_path / "out", right, observer=lambda event: phases.append(event.phase))
    assert "distill" not in phases and not (tmp_path / ".out.chain").exists()
    wrong["stages"][0]["distill"]["data"] = str(tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match=r"stage 1 \(distill\)"):
        run(tiny, tmp_path / "again", chain.build(wrong))
    assert not (tmp_path / ".again.chain").exists()


def test_python_and_the_command_run_chains_alike(tiny: Path, tmp_path: Path, text: str) -> None:
    wanted = chain.build(content(text))
    (tmp_path / "chain.yaml").write_text(chain.dump(wanted))
    report = lmpress.run(tiny, recipe=wanted)
    assert report.out == tmp_path / "tiny-distill-gptq-w4-fp16"
    lmpress.run(tiny, tmp_path / "file", str(tmp_path / "chain.yaml"))
    assert contents(tmp_path / "file") == contents(report.out)
    with pytest.raises(UsageError, match="target does not apply to a chain"):
        lmpress.run(tiny, tmp_path / "no", str(tmp_path / "chain.yaml"), target=["vllm"])


@pytest.mark.parametrize("last", ["gguf", "onnx", "fp16"])
def test_the_result_is_evaluated_whatever_it_is_exported_to(tiny: Path, tmp_path: Path, text: str, last: str) -> None:
    pytest.importorskip({"gguf": "gguf", "onnx": "onnx", "fp16": "torch"}[last])
    wanted = content(text)
    wanted["stages"][0]["distill"]["steps"] = 0
    wanted["stages"][2] = {"export": {"format": last}}
    (tmp_path / "chain.json").write_text(json.dumps(wanted))
    words = ["run", str(tiny), "--recipe", str(tmp_path / "chain.json"), "-o", str(tmp_path / "out"), "--eval", text]
    done = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    evaluated = "tiny-distill-gptq-w4" + ("-fp16" if last == "fp16" else "")
    assert found["evaluated"] == evaluated and found["evaluation"]["perplexity"] > 1
    assert "perplexity_base" in found["evaluation"] and f"evaluated: {evaluated}\n" in done.stderr


def test_a_chain_that_ends_in_distillation_names_no_hidden_folder(tiny: Path, tmp_path: Path, text: str) -> None:
    wanted = {"stages": content(text)["stages"][:1]}
    lmpress.run(tiny, tmp_path / "out", chain.build(wanted))
    for file in (tmp_path / "out").glob("*.json"):
        assert ".chain" not in file.read_text() and ".distill" not in file.read_text(), file.name
    assert json.loads((tmp_path / "out/report.json").read_text())["kept"] == [1]


def test_a_chain_exports_what_the_command_exports() -> None:
    assert set(get_args(chain.Format)) == set(export.formats())


def test_the_shipped_chain_ends_with_the_passes_of_best_w4() -> None:
    found = chain.read("smaller-w4")
    assert isinstance(found, chain.Chain) and chain.build(found.as_dict()) == found
    asked = found.stages[1]
    assert isinstance(asked, schema.Recipe) and asked.passes[1:] == schema.read("best-w4").passes

"""The command line: one clear line and the right exit code for everything that can go wrong, and no unfinished output."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lmpress.calibrate.model import safetensors_io
from lmpress.cli import app

CALIBRATION = ["--samples", "4", "--seq-len", "16", "--group-size", "8"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 60)
    return str(tmp_path / "text.txt")


def compress(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def quantize(model: object, out: Path, calib: str, *more: object) -> Result:
    return compress("quantize", model, "-o", out, "--calib", calib, *CALIBRATION, *more)


def refused(result: Result, code: int, *words: str) -> None:
    """Exit code, one `error:` line, at most one `hint:` line, all the words, no traceback."""
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert result.exit_code == code, result.output
    assert len(errors) == 1 and sum(line.startswith("hint: ") for line in lines) <= 1, result.output
    assert lines.index(errors[0]) >= len(lines) - 2, "nothing follows the error but its hint"
    assert "unexpected" not in errors[0] and "Traceback" not in result.output
    assert all(word in result.stderr for word in words), result.stderr


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"text.txt", "tiny", "out.log"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_run_from_start_to_finish(tiny: Path, tmp_path: Path, text: str, method: str) -> None:
    result = quantize(tiny, tmp_path / "out", text, "--method", method, "--json", "-", "--eval", text)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)  # data alone go to stdout
    out = tmp_path / "out"
    assert found["bytes_after"] == (out / "model.safetensors").stat().st_size
    assert found["bytes_before"] == (tiny / "model.safetensors").stat().st_size
    assert found["verdict"] in ("HEALTHY", "SUSPECT") and found["out"] == str(out)
    assert len(found["layers"]) == 14 and {"name", "bits", "group_size"} <= found["layers"][0].keys()
    assert {"bits_per_weight", "seconds", "peak_bytes", "notes"} <= found.keys()
    assert {"perplexity", "perplexity_base", "kl", "top1_agreement", "protocol"} <= found["evaluation"].keys()
    assert f"written to {out}" in result.stderr and "bits per compressed weight" in result.stderr
    assert leftovers(tmp_path) == {"out"}
    log = (tmp_path / "out.log").read_text()
    assert all(phase in log for phase in (" plan ", " solve 1/2 model.layers.0.", " write 2/2", " done"))


def test_the_output_is_next_to_the_model_by_default(tiny: Path, text: str) -> None:
    assert compress("quantize", tiny, "--method", "rtn", "--bits", "3", "-q").exit_code == 0
    assert (tiny.parent / "tiny-rtn-w3" / "config.json").exists()


def test_missing_parent_folders_are_created(tiny: Path, tmp_path: Path, text: str) -> None:
    assert quantize(tiny, tmp_path / "a/b/out", text, "--method", "rtn").exit_code == 0
    assert (tmp_path / "a/b/out/config.json").exists()


def test_quiet_prints_nothing(tiny: Path, tmp_path: Path, text: str) -> None:
    result = quantize(tiny, tmp_path / "out", text, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_a_dry_run_writes_nothing_and_predicts_the_size(tiny: Path, tmp_path: Path, text: str) -> None:
    before = leftovers(tmp_path)
    promised = json.loads(quantize(tiny, tmp_path / "out", text, "--dry-run", "--json", "-").stdout)
    assert leftovers(tmp_path) == before and not (tmp_path / "out.log").exists()
    assert promised.keys() == {"bytes_before", "bytes_after", "notes"}
    kept = json.loads(quantize(tiny, tmp_path / "out", text, "--json", "-").stdout)
    assert promised == {name: kept[name] for name in promised}


def test_json_goes_to_a_file(tiny: Path, tmp_path: Path, text: str) -> None:
    assert compress("eval", tiny, "--data", text, "--rows", "3", "--json", tmp_path / "x.json").exit_code == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert {"perplexity", "tokens", "protocol"} <= found.keys() and "kl" not in found
    refused(
        compress("eval", tiny, "--data", text, "--rows", "3", "--json", tiny / "config.json" / "x"), 2, "is not a folder"
    )  # fmt: skip


def test_inspect_and_recipes_print_json(tiny: Path) -> None:
    found = json.loads(compress("inspect", tiny, "--json", "-").stdout)
    assert (found["architecture"], found["block_count"], found["tokenizer"]) == ("LlamaForCausalLM", 2, True)
    assert len(found["linears"]) == 7 and found["quantization"] is None
    assert "gptq-w4" in json.loads(compress("recipes", "list", "--json", "-").stdout)
    shown = json.loads(compress("recipes", "show", "gptq-w4", "--json", "-").stdout)
    assert shown["passes"][0]["method"] == "gptq"
    assert "LlamaForCausalLM" in compress("inspect", tiny).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "gtpq"], ["unknown method 'gtpq'", "did you mean gptq"]),
        (["--bits", "1"], ["bits 1 is outside 2..8"]),
        (["--bits", "9"], ["bits 9 is outside 2..8"]),
        (["--group-size", "0"], ["group size 0", "multiple of 8"]),
        (["--group-size", "7"], ["group size 7", "multiple of 8"]),
        (["--set", "dampling=1"], ["no option 'dampling'", "did you mean damping"]),
        (["--set", "damping"], ["--set expects NAME=VALUE, got 'damping'"]),
        (["--set", "damping=["], ["--set 'damping=['"]),
        (["--keep", "*"], ["leaves every layer dense"]),
        (["--calib", "nowhere.txt"], ["nowhere.txt: no such file"]),
        (["--calib", "nowhere"], ["nowhere: neither a file nor a known data set"]),
        (["--device", "gpu0"], ["device 'gpu0' is unknown"]),
        (["--device", "cuda:99"], ["no device 'cuda:99'"]),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_refused_and_explained(
    tiny: Path, tmp_path: Path, text: str, arguments: list[str], words: Sequence[str]
) -> None:
    refused(quantize(tiny, tmp_path / "out", text, *arguments), 2, *words)
    assert leftovers(tmp_path) == set()


def test_folders_that_hold_no_model_are_refused(tiny: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    refused(quantize(tmp_path / "nowhere", out, text), 2, "nowhere: no such directory")
    (tiny / "config.json").unlink()
    refused(quantize(tiny, out, text), 2, "has no config.json")
    assert leftovers(tmp_path) == set()


def test_a_missing_tokenizer_is_reported(tiny: Path, tmp_path: Path, text: str) -> None:
    (tiny / "tokenizer.json").unlink()
    refused(quantize(tiny, tmp_path / "out", text), 1, f"{tiny} has no tokenizer")
    refused(compress("eval", tiny, "--data", text), 1, "has no tokenizer")
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ["text.txt is empty"]), (b" \n", ["is empty"]), (b"abc", ["too short"]), (b"abc\n\xff", ["not UTF-8", "line 2"])],
    ids=["empty", "blank", "short", "bytes"],
)  # fmt: skip
def test_unusable_calibration_text_is_refused(
    tiny: Path, tmp_path: Path, text: str, content: bytes, words: Sequence[str]
) -> None:
    Path(text).write_bytes(content)
    refused(quantize(tiny, tmp_path / "out", text), 1, "text.txt", *words)
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_weight_that_is_not_a_number_is_named(tiny: Path, tmp_path: Path, text: str, name: str, method: str) -> None:
    tensors = safetensors_io.read(tiny / "model.safetensors")
    tensors[name].view(-1)[3] = torch.nan
    safetensors_io.write(tiny / "model.safetensors", tensors)
    refused(quantize(tiny, tmp_path / "out", text, "--method", method), 1, name, "NaN")
    assert leftovers(tmp_path) == set()


def test_a_truncated_shard_is_named(tiny: Path, tmp_path: Path, text: str) -> None:
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for command in (quantize(tiny, tmp_path / "out", text), compress("inspect", tiny), compress("eval", tiny)):
        refused(command, 1, "model.safetensors is truncated")
    assert leftovers(tmp_path) == set()


def test_an_existing_output_is_kept_until_it_is_replaced(tiny: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    refused(quantize(tiny, out, text, "--overwrite"), 2, "out is not a result of lmpress")
    (out / "stages.json").write_text('{"stages": [], "done": []}')  # now it is
    before = contents(out)
    refused(quantize(tiny, out, text), 2, "out exists already", "--overwrite")
    refused(quantize(tiny, out, "nowhere.txt", "--overwrite"), 2, "no such file")
    assert contents(out) == before
    assert quantize(tiny, out, text, "--overwrite").exit_code == 0
    assert "precious" not in contents(out) and leftovers(tmp_path) == {"out"}
    (tmp_path / "file").write_text("x")
    refused(quantize(tiny, tmp_path / "file", text, "--overwrite"), 2, "file is a file")


@pytest.mark.parametrize("below", ["out", "a/out"])
def test_an_output_below_a_file_is_refused(tiny: Path, tmp_path: Path, text: str, below: str) -> None:
    (tmp_path / "file").write_text("x")
    refused(quantize(tiny, tmp_path / "file" / below, text), 2, "is not a folder", "choose another path")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_in_a_read_only_folder_is_refused(tiny: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(quantize(tiny, tmp_path / "locked" / "out", text), 1, "cannot be written", "choose another -o")


def test_a_quantized_model_is_not_quantized_again(tiny: Path, tmp_path: Path, text: str) -> None:
    assert quantize(tiny, tmp_path / "out", text).exit_code == 0
    refused(quantize(tmp_path / "out", tmp_path / "again", text), 2, "is quantized already")


def program(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which can write files of at most `limit` bytes."""
    code = "import resource, sys; from lmpress.cli import app; app()"
    if limit is not None:
        code = code.replace("app()", f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); app()")
    root = Path(sys.modules["lmpress"].__file__ or "").parent.parent
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(root)},
    )


def test_the_help_of_a_command_has_a_purpose_and_an_example() -> None:
    text = re.sub(r"\s+", " ", program("quantize", "--help").stdout)
    assert "Quantize the weights of MODEL" in text and "compress quantize --method gptq --bits 4 MODEL" in text


@pytest.mark.parametrize("limit", [1000, 9000], ids=["first-block", "assembling"])
def test_after_a_full_disk_the_same_command_continues(tiny: Path, tmp_path: Path, text: str, limit: int) -> None:
    out = tmp_path / "out"
    command = ["quantize", tiny, "-o", out, "--calib", text, *CALIBRATION, "--threads", "1"]
    stopped = program(*command, limit=limit)
    assert stopped.returncode == 1
    assert "error: the disk is full" in stopped.stderr and "repeat the same command" in stopped.stderr
    assert "Traceback" not in stopped.stderr and not out.exists()
    partial = tmp_path / ".out.partial"
    assert partial.exists() == (limit == 9000)
    assert not list(tmp_path.rglob("*.safetensors.partial"))
    assert program(*command).returncode == 0
    assert leftovers(tmp_path) == {"out"}
    assert quantize(tiny, tmp_path / "whole", text).exit_code == 0
    assert contents(out) == contents(tmp_path / "whole")

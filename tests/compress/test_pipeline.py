"""The whole pipeline on small models: exact plans, equal bytes, killed runs, and the benefit of calibration."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lmpress
from lmpress.calibrate.data.token_rows import calibration_rows
from lmpress.calibrate.model.skeleton import build
from lmpress.calibrate.runner import Runner
from lmpress.compress import pipeline
from lmpress.compress.block import Linear
from lmpress.compress.formats.source import open_source
from lmpress.compress.formats.tokenizer import load_tokenizer
from lmpress.compress.methods.quantize import gptq
from lmpress.compress.plan import make_plan
from lmpress.compress.report.progress import Event
from lmpress.compress.run import Run
from lmpress.errors import UsageError
from lmpress.recipes.options.quantize import QuantizeOptions
from lmpress.recipes.scheme import QuantArgs

SMALL: dict[str, Any] = {"samples": 8, "seq_len": 16, "group_size": 8}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 60)
    return str(tmp_path / "text.txt")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_sizes_are_as_planned(tiny: Path, tmp_path: Path, text: str, method: str, symmetric: bool) -> None:
    options = {"method": method, "bits": 3, "symmetric": symmetric, "calib": text, **SMALL}
    promised = Run.of(tiny, QuantizeOptions(**options).recipe()).plan
    report = lmpress.quantize(tiny, tmp_path / "out", **options)
    stored = open_source(tmp_path / "out")
    assert {name: tensor.spec for name, tensor in stored.tensors.items()} == promised.tensors
    assert report.bytes_after == promised.bytes_after == (tmp_path / "out/model.safetensors").stat().st_size
    assert report.bytes_before == (tiny / "model.safetensors").stat().st_size
    # 16 and 24 wide, 3 bits, float16 scales for groups of 8, two int64 of shape, perhaps 3 bits of zero in whole words
    attention, up, down = ((16, 16), 4), ((24, 16), 2), ((16, 24), 1)
    words = sum(
        n * (rows * -(-columns * 3 // 32) * 4 + rows * columns // 8 * 2 + 16)
        for (rows, columns), n in (attention, up, down)
    )
    zeros = sum(n * -(-rows * 3 // 32) * 4 * columns // 8 for (rows, columns), n in (attention, up, down))
    assert sum(layer.nbytes for layer in report.plan.layers) == 2 * (words + (0 if symmetric else zeros))


@pytest.mark.parametrize("options", [{}, {"true_sequential": True}, {"order": "group", "groups": "dynamic"}])
def test_a_repeated_run_gives_the_same_bytes(tiny: Path, tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    for name in ("one", "two"):
        lmpress.quantize(tiny, tmp_path / name, calib=text, options=options, **SMALL)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 9


def test_a_block_is_calibrated_on_what_the_compressed_blocks_give_it(tiny: Path, tmp_path: Path, text: str) -> None:
    losses = []
    for keep in ([], ["*.0.*"]):
        report = lmpress.quantize(tiny, tmp_path / f"out{len(keep)}", bits=2, calib=text, keep=keep, **SMALL)
        losses.append([layer["rtn_loss"] for layer in report.layers if ".1." in str(layer["name"])])
    assert len(losses[0]) == 7 and all(a != b for a, b in zip(*losses, strict=True))


KILLED = """
import os, signal, sys
import torch
from lmpress.compress.api import quantize

torch.set_num_threads(1)
model, folder, text, *points = sys.argv[1:]
for number, point in enumerate(points):
    phase, block = point.split("/")

    def die(event):
        if (event.phase, event.block) == (phase, int(block)):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        quantize(model, f"{folder}/{number}", calib=text, samples=8, seq_len=16, group_size=8, observer=die)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_killed_runs_resume_and_write_the_same_bytes(tiny: Path, tmp_path: Path, text: str) -> None:
    """Each run dies by SIGKILL at its point; the same call then finishes it."""
    points = ["capture/0", "solve/0", "write/0", "forward/0", "block/0", "solve/1", "write/1", "block/1", "assemble/2"]
    root = Path(lmpress.__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, tiny, tmp_path, text, *points],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.split() == [str(int(signal.SIGKILL))] * len(points)
    lmpress.quantize(tiny, tmp_path / "whole", calib=text, **SMALL)
    for number, point in enumerate(points):
        out, finished = tmp_path / str(number), ("write/1" in points[:number]) + ("write/0" in points[:number])
        assert not out.exists() and (tmp_path / f".{number}.partial").exists()
        loaded: list[Event] = []
        lmpress.quantize(tiny, out, calib=text, observer=loaded.append, **SMALL)
        assert contents(out) == contents(tmp_path / "whole"), point
        assert not (tmp_path / f".{number}.partial").exists()
        written = [event.block for event in loaded if event.phase == "write"]
        assert written == list(range(2))[finished:], "finished blocks are not solved again"


def stopped(model: Path, out: Path, **options: Any) -> None:
    """An unfinished run: interrupted when its second block begins."""

    def interrupt(event: Event) -> None:
        if (event.phase, event.block) == ("load", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lmpress.quantize(model, out, observer=interrupt, **options)


@pytest.mark.parametrize("changes", [{"bits": 3}, {"seed": 1}, {"samples": 7}, {"options": {"damping": 0.1}}], ids=str)
def test_an_unfinished_run_with_other_options_is_not_resumed(
    tiny: Path, tmp_path: Path, text: str, changes: dict[str, Any]
) -> None:
    out, options = tmp_path / "out", {"calib": text, **SMALL}
    stopped(tiny, out, **options)
    before = contents(tmp_path / ".out.partial")
    assert "parts/block-00000.safetensors" in before
    with pytest.raises(UsageError, match="unfinished run with other settings; repeat those, or discard it"):
        lmpress.quantize(tiny, out, **options | changes)
    assert contents(tmp_path / ".out.partial") == before
    lmpress.quantize(tiny, out, overwrite=True, **options | changes)
    lmpress.quantize(tiny, tmp_path / "fresh", **options | changes)
    assert contents(out) == contents(tmp_path / "fresh")


def test_an_unfinished_run_of_another_model_is_not_resumed(tiny: Path, tmp_path: Path, text: str) -> None:
    stopped(tiny, tmp_path / "out", calib=text, **SMALL)
    data = bytearray((tiny / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (tiny / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="other settings"):
        lmpress.quantize(tiny, tmp_path / "out", calib=text, **SMALL)


def test_parts_without_a_manifest_are_not_resumed(tiny: Path, tmp_path: Path, text: str) -> None:
    stopped(tiny, tmp_path / "out", calib=text, bits=2, **SMALL)
    (tmp_path / ".out.partial/manifest.json").unlink()
    lmpress.quantize(tiny, tmp_path / "out", calib=text, bits=4, **SMALL)
    lmpress.quantize(tiny, tmp_path / "fresh", calib=text, bits=4, **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_conv1d_layers_are_quantized(tmp_path: Path, text: str, letters: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=10, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    letters.save_pretrained(tmp_path / "gpt2")
    report = lmpress.quantize(tmp_path / "gpt2", tmp_path / "out", bits=8, calib=text, **SMALL)
    assert {layer.kind for layer in report.plan.layers} == {"Conv1D"}
    assert report.bytes_after == (tmp_path / "out/model.safetensors").stat().st_size
    found = lmpress.evaluate(tmp_path / "out", text, against=tmp_path / "gpt2", seq_len=16)
    assert found.kl is not None and 0 < found.kl < 1e-2


# The accuracy of the methods on trained models.
MODELS = {
    "stories260K": ("tinystories/train.jsonl", "tinystories/test.jsonl", 256, 32),
    "stories260K-outlier": ("tinystories/train.jsonl", "tinystories/test.jsonl", 256, 32),
    "babyllama-105": ("tinystories/train.jsonl", "tinystories/test.jsonl", 256, 32),
    "babygpt-shakespeare-gpt2": ("tinyshakespeare/train.txt", "tinyshakespeare/test.txt", 64, 32),
}


def divergence(assets: Path, model: str, out: Path, **options: Any) -> tuple[float, list[dict[str, Any]]]:
    """KL of the quantized model from the original in nats per token, and the figures of its layers."""
    train, test, length, group = MODELS[model]
    path = assets / "models" / model
    options = {"group_size": group, "calib": str(assets / "data" / train), "seq_len": length, **options}
    report = lmpress.quantize(path, out, **options)
    found = lmpress.evaluate(out, str(assets / "data" / test), against=path, seq_len=length, rows=32)
    assert found.kl is not None
    return found.kl, report.layers


@pytest.mark.parametrize(
    ("bits", "symmetric", "ratio"),
    [(4, True, 0.70), (4, False, 0.70), (3, False, 0.65)],
    ids=["4sym", "4asym", "3asym"],
)
def test_gptq_keeps_most_of_what_rounding_loses(
    assets: Path, tmp_path: Path, bits: int, symmetric: bool, ratio: float
) -> None:
    options = {"bits": bits, "symmetric": symmetric}
    solved, layers = divergence(assets, "stories260K", tmp_path / "gptq", **options)
    rounded, _ = divergence(assets, "stories260K", tmp_path / "rtn", method="rtn", **options)
    assert solved <= ratio * rounded
    assert len(layers) == 35 and all(layer["loss"] <= layer["rtn_loss"] for layer in layers)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "stories260K"])
def test_gptq_is_never_worse_than_rounding(assets: Path, tmp_path: Path, model: str) -> None:
    solved, layers = divergence(assets, model, tmp_path / "gptq", samples=64)
    rounded, _ = divergence(assets, model, tmp_path / "rtn", method="rtn")
    assert solved <= rounded
    assert all(layer["loss"] <= layer["rtn_loss"] for layer in layers)


def test_the_residual_identity_holds_on_every_linear_of_a_trained_model(assets: Path, tmp_path: Path) -> None:
    """I1: `W - Q = E U` and `sum(E**2) / 2` is the damped loss, here as the pipeline's own pieces give them."""
    source = open_source(assets / "models/stories260K")
    tokenizer = load_tokenizer(source.path)
    rows = calibration_rows(str(assets / "data/tinystories/train.jsonl"), tokenizer, samples=32, length=256)
    recipe = QuantizeOptions(group_size=32, quality="fast").recipe()  # the sweep alone, no descent after it
    skeleton = build(source)
    planned, config = make_plan(source, skeleton, recipe), recipe.passes[0].config
    runner = Runner(skeleton, source, rows, tmp_path)
    runner.capture()
    checked = 0
    for index in range(planned.blocks):
        block = runner.load(index)
        linears: list[Linear] = pipeline._linears(runner.block_name(index), block, planned)
        statistics = runner.collect(index, {linear.name.split(".", 3)[3] for linear in linears})
        for linear in linears:
            matrix = statistics.hessians[linear.name.split(".", 3)[3]].matrix()
            assert identity_holds(linear.weight, matrix, linear.args, config), linear.name
            checked += 1
        runner.forward(index)
        runner.unload(index)
    assert checked == 35


def identity_holds(weight: torch.Tensor, hessian: torch.Tensor, args: QuantArgs, config: gptq.GPTQ) -> bool:
    prepared = gptq.prepare(hessian, args, config)
    solution = gptq.solve(weight, prepared, args, config)
    delta = (weight - solution.tensor.dequantize())[:, prepared.order].double()
    product = gptq.sweep_columns(weight, prepared, args, config)[2].T.double() @ prepared.factor.upper.double()
    ordered = prepared.hessian.double()[prepared.order][:, prepared.order]
    damped = ordered + prepared.factor.damping * ordered.diagonal().mean() * torch.eye(len(ordered))
    loss = float((delta @ damped * delta).sum()) / 2
    return bool((delta - product).norm() <= 1e-5 * delta.norm()) and solution.damped_loss == pytest.approx(
        loss, rel=1e-4
    )

"""`compress eval --speed` and the kernels that `compress inspect` names, on a small random model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import lmpress
from lmpress.cli import app
from lmpress.compress.formats.source import open_source
from lmpress.errors import UsageError
from lmpress.eval.dispatch_report import served
from lmpress.eval.timing import speed as module
from lmpress.eval.timing.speed import speed
from lmpress.kernels.modules.linear import PackedLinear, kernels_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a context that is long enough, and a checkpoint of it."""
    path = tmp_path_factory.mktemp("speed")
    config = LlamaConfig(
        vocab_size=40, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path / "dense")
    lmpress.quantize(path / "dense", path / "packed", method="rtn", bits=4, group_size=32)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 2)


def test_models_are_timed_side_by_side(folder: Path) -> None:
    found = {each.name: each for each in speed(folder / "packed", against=folder / "dense")}
    assert list(found) == ["dense", "packed", "packed, int8 inputs"]
    base, exact, quick = found.values()
    assert (base.prefill_ratio, base.decode_ratio, base.kernels) == (1, 1, {})
    assert exact.decode_ratio == pytest.approx(exact.decode / base.decode)
    assert all(name.endswith("float") for name in exact.kernels) and all(
        name.endswith("group") for name in quick.kernels
    )
    assert sum(exact.kernels.values()) == 7
    assert exact.weight_bytes < 0.4 * base.weight_bytes
    for each in found.values():
        assert each.prefill > each.decode > 0
        assert each.weight_bytes < each.peak_bytes < 4e9


def test_peak_memory_is_the_models_own(folder: Path) -> None:
    ballast = torch.ones(512 << 20, dtype=torch.uint8)  # of this process, not of the one that is measured
    arguments = {"path": str(folder / "dense"), "device": "cpu", "dtype": "float32", "kernel": None}
    alone = module._peak_of_process(arguments)
    assert abs(alone - module._peak_of_process(arguments)) < 0.1 * alone
    assert ballast.sum() and alone < module.peak(**arguments) - 256e6


def test_a_forced_kernel_is_timed_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_peak_of_process", lambda arguments: 1)
    found = speed(folder / "packed", kernel="torch-dequantize")
    assert [each.kernels for each in found] == [{"torch-dequantize float": 7}]
    assert found[0].decode_ratio is None
    with pytest.raises(UsageError, match="no kernel is called"):
        speed(folder / "packed", kernel="nonsense")


def test_models_of_the_same_name_get_different_labels() -> None:
    assert module._names("a/model", "b/base") == ("model", "base")
    assert module._names("a/model", "b/model") == ("a/model", "b/model")
    assert len(set(module._names("a/model", "a/model"))) == 2


def test_a_context_that_is_too_short_is_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="the model has 32"):
        speed(tiny)


def test_the_kernels_that_are_named_are_those_that_serve(folder: Path) -> None:
    for exact in (True, False):
        named = served(folder / "packed", exact=exact)
        model = lmpress.load(folder / "packed", exact=exact)
        for each in named:
            layers = [m for n, m in model.named_modules() if isinstance(m, PackedLinear) and n.endswith(each.layer)]
            assert {(m.kernel, m.activations) for m in layers} == {(each.kernel, each.inputs)}
        assert sum(each.count for each in named) == sum(kernels_of(model).values())
    assert {each.kernel for each in served(folder / "packed", kernel="torch-dequantize")} == {"torch-dequantize"}
    assert served(folder / "dense") == []


def test_inspect_shows_them_and_still_reads_what_we_cannot_serve(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(folder / "packed"), "--kernel", "torch-dequantize", "--json", "-"])
    assert done.exit_code == 0, done.output
    kernels = json.loads(done.stdout)["kernels"]
    assert {each["kernel"] for each in kernels} == {"torch-dequantize"} and sum(each["count"] for each in kernels) == 7
    shown = CliRunner().invoke(app, ["inspect", str(folder / "packed")])
    assert "packed layer" in shown.stdout and kernels[0]["stored"].split(",")[0] in shown.stdout
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in open_source(folder / "dense").path.iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    config = json.loads((foreign / "config.json").read_text()) | {"quantization_config": {"quant_method": "unknown"}}
    (foreign / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["inspect", str(foreign), "--json", "-"])
    assert done.exit_code == 0 and json.loads(done.stdout)["kernels"] == []

"""`verify` accepts correct checkpoints, and finds one wrong nibble, one wrong scale and one wrong order of rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.cli import app
from lmpress.compress.output.record import RECORD
from lmpress.errors import CompressError, UsageError
from lmpress.eval import runtimes
from lmpress.eval.tables import verification
from lmpress.eval.verify import FLIPPED
from lmpress.recipes.schema import Recipe

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    lmpress.quantize(folder / "model", folder / "q", method="rtn", group_size=32)
    return folder / "q"


def nibble(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight_packed"][5, 3] ^= 1 << 8


def scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"][5, 1] *= 1.5


def permutation(tensors: dict[str, Tensor]) -> None:
    """Swap rows 6 and 7, with their scales."""
    for part in ("weight_packed", "weight_scale"):
        tensors[f"{LAYER}.{part}"][[6, 7]] = tensors[f"{LAYER}.{part}"][[7, 6]]


@pytest.mark.parametrize("corrupt", [nibble, scale, permutation], ids=lambda f: f.__name__)
def test_one_corruption_is_found_and_named(
    checkpoint: Path, tmp_path: Path, corrupt: Callable[[dict[str, Tensor]], None]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "bad")
    tensors = safetensors_io.read(tmp_path / "bad" / "model.safetensors")
    corrupt(tensors)
    safetensors_io.write(tmp_path / "bad" / "model.safetensors", tensors)
    with pytest.raises(CompressError, match="SHA-256"):
        lmpress.verify(tmp_path / "bad", against=checkpoint, runtime=["lmpress"])
    (tmp_path / "bad" / RECORD).unlink()
    (finding,) = lmpress.verify(tmp_path / "bad", against=checkpoint, runtime=["lmpress"]).findings
    assert not finding.ok and finding.error is None
    assert finding.wrong_layers == (LAYER,) and finding.worst_layer == LAYER and finding.steps >= 0.5
    assert finding.block == 1


def test_transformers_and_its_gguf_reader_serve_the_weights_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """The checkpoint as written, its GGUF export, and the table and exit code of the command."""
    lmpress.export(checkpoint, tmp_path / "gguf", format="gguf")
    found = lmpress.verify(tmp_path / "gguf", against=checkpoint, runtime=["gguf-transformers"])
    (finding,) = found.findings
    assert (
        found.ok
        and finding.steps == 0
        and finding.outputs.logits < 1e-5
        and finding.outputs.top1 == 1
        and finding.block is None
    )
    assert finding.versions.keys() == {"transformers", "torch", "gguf"}
    done = CliRunner().invoke(app, ["verify", str(checkpoint), "--runtime", "transformers", "--json", "-"])
    assert done.exit_code == 0 and '"steps": 0.0' in done.output


def test_the_message_of_the_runtime_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").unlink()
    (tmp_path / "bad" / RECORD).unlink()
    command = ["verify", str(tmp_path / "bad"), "--against", str(checkpoint), "--runtime", "lmpress", "--json", "-"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "has no weights" in json.loads(done.stdout)["findings"][0]["error"]


def test_wrong_requests_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="unknown runtime 'vllm'; runtimes: transformers"):
        lmpress.verify(checkpoint, runtime=["vllm"])
    dense = checkpoint.parent / "model"
    with pytest.raises(
        UsageError, match=r"neither .*model nor the model that it is compared with is quantized.*compress eval"
    ):
        lmpress.verify(dense, against=dense)


def test_against_the_dense_original_the_divergence_is_reported_but_not_judged(checkpoint: Path, tmp_path: Path) -> None:
    """Exactness is judged against the checkpoint; the divergence from the original is not part of the verdict."""
    dense = checkpoint.parent / "model"
    command = ["verify", str(checkpoint), "--against", str(dense), "--runtime", "lmpress"]
    done = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    (finding,) = found["findings"]
    assert found["against"] == str(checkpoint) and found["original"] == str(dense) and finding["ok"]
    assert finding["steps"] == 0 and finding["outputs"]["kl"] < 1e-9
    ids = torch.randint(0, 16, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        p, q = (lmpress.load(path)(ids).logits.double().log_softmax(-1) for path in (dense, checkpoint))
    assert finding["original"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert "not judged" in done.output


def test_a_format_that_lmpress_does_not_read_needs_the_quantized_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    lmpress.export(checkpoint, tmp_path / "onnx", format="onnx")
    with pytest.raises(UsageError, match=r"give --against the quantized checkpoint"):
        lmpress.verify(tmp_path / "onnx", against=checkpoint.parent / "model", runtime=["onnxruntime"])


ROWWISE = {"bits": 8, "strategy": "channel", "group_size": None, "formula": "signed"}


@pytest.mark.parametrize("weights", [ROWWISE, {"bits": 4, "group_size": 32}], ids=["W8A8", "W4A8"])
def test_rounded_inputs_are_part_of_what_is_verified(checkpoint: Path, tmp_path: Path, weights: dict[str, Any]) -> None:
    """compressed-tensors and lmpress divide dynamic ranges by 127.5 and 127: each is compared with its own formula."""
    inputs = {"bits": 8, "strategy": "token", "group_size": None, "formula": "signed", "dynamic": True}
    passes = [{"method": "rtn", "scheme": {"weights": weights, "inputs": inputs}}]
    lmpress.run(checkpoint.parent / "model", tmp_path / "q", Recipe.model_validate({"passes": passes}))
    for finding in lmpress.verify(tmp_path / "q", runtime=["transformers", "lmpress"]).findings:
        assert finding.ok and finding.steps < 1e-4, finding  # 127 times the rounding of a reciprocal
        assert finding.outputs.logits < (1e-5 if finding.runtime == "transformers" else FLIPPED), finding


def test_runtimes_of_another_environment_can_be_used(checkpoint: Path, tmp_path: Path) -> None:
    """`--python` starts them; if the interpreter cannot, its own message is shown."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    (finding,) = lmpress.verify(checkpoint, runtime=["lmpress"], python=broken).findings
    assert not finding.ok and finding.error == "ImportError: no such thing"


def test_the_served_weight_of_any_linear_module_can_be_read() -> None:
    linear = nn.Linear(5, 3)
    assert torch.allclose(runtimes.served_weight(linear, torch.float32), linear.weight, atol=1e-6)
    without = nn.Linear(5, 3, bias=False)
    assert torch.equal(runtimes.served_weight(without, torch.float32), without.weight)


def test_the_table_names_tensor_and_block() -> None:
    from lmpress.eval.verify import Divergence, Finding, Verification

    off = Divergence(logits=1.0, kl=0.1, top1=0.5)
    finding = Finding("r", {"p": "1"}, steps=2.0, worst_layer=LAYER, wrong_layers=(LAYER,), outputs=off, block=1)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(verification(Verification("a", "b", (finding,))))
    assert f"WRONG: wrong weight of {LAYER}, outputs diverge from block 1 on" in capture.get()

"""Recovery without training all weights: adapters that are merged at the end, and pruned weights that stay zero."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.compress.distill.adapters import attach_adapters
from lmpress.compress.distill.knowledge import pruned_masks, train
from lmpress.compress.distill.training_state import STATE, TrainingState
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.errors import UsageError
from lmpress.recipes.training import DistillConfig

OPTIONS: dict[str, Any] = {"steps": 12, "batch": 8, "checks": 4, "rate": 1e-2}
IDS = torch.randint(2, 10, (24, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 60)
    return str(tmp_path / "text.txt")


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_change_the_blocks_linears_by_matrices_of_their_rank(family: str, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    student: Any = LlamaForCausalLM.from_pretrained(tiny) if family == "llama" else gpt2()
    teacher: Any = LlamaForCausalLM.from_pretrained(tiny) if family == "llama" else gpt2()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before, kinds = weights(student), [type(module) for module in student.modules()]
    course = train(
        student, teacher, IDS[8:], IDS[:8], [(0, 0), (1, 1)], DistillConfig(**OPTIONS, lora=2), TrainingState(tmp_path)
    )
    assert course.best_step > 0 and course.curve[-1][2] < course.curve[0][2]
    assert [type(module) for module in student.modules()] == kinds
    after = weights(student)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    inside = "model.layers" if family == "llama" else "transformer.h"
    assert changed == {n for n, p in before.items() if n.startswith(inside) and p.ndim == 2}
    for name in changed:
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert int((values > 1e-5 * values[0]).sum()) == 2
    state = safetensors_io.read(tmp_path / STATE)
    assert all("lora_" in name for name in state if name != "notes")


def test_untrained_adapters_change_nothing_and_merge_to_the_same_bits(tiny: Path) -> None:
    pytest.importorskip("peft")
    student = LlamaForCausalLM.from_pretrained(tiny).eval()
    before = weights(student)
    with torch.no_grad():
        logits = student(IDS).logits
        fold = attach_adapters(student, 4, seed=0)
        assert torch.equal(student(IDS).logits, logits)
    fold()
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_adapters_recover_a_reduced_model_after_a_kill(tiny: Path, tmp_path: Path, text: str) -> None:
    pytest.importorskip("peft")
    words: dict[str, Any] = {"keep_layers": 1, "choice": "spread", "data": text, "samples": 64, "seq_len": 16}
    words["options"] = OPTIONS | {"lora": 4}

    class Killed(Exception):
        pass

    def kill(event: Any) -> None:
        if (event.phase, event.block) == ("distill", 6):
            raise Killed

    report = lmpress.distill(tiny, tmp_path / "out", **words)
    assert report.history.curve[-1][2] < report.history.curve[0][2]
    with pytest.raises(Killed):
        lmpress.distill(tiny, tmp_path / "again", observer=kill, **words)
    lmpress.distill(tiny, tmp_path / "again", **words)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == 1


@pytest.mark.parametrize(
    "words",
    [
        {"sparsity": 0.5, "format": "bitmask"},
        {"pattern": "2:4", "format": "2:4"},
        {"sparsity": 0.5, "format": "dense"},
    ],
    ids=["bitmask", "2:4", "dense"],
)
def test_a_pruned_model_is_trained_and_keeps_its_zeros_and_its_format(
    tiny: Path, tmp_path: Path, text: str, words: dict[str, Any]
) -> None:
    lmpress.prune(tiny, tmp_path / "pruned", method="magnitude", calib=text, **words)
    options = OPTIONS | {"rate": 3e-3}
    report = lmpress.distill(
        tmp_path / "pruned", tmp_path / "out", teacher=tiny, data=text, samples=64, seq_len=16, options=options
    )
    assert report.history.best_step > 0 and report.history.curve[-1][2] < 0.9 * report.history.curve[0][2]
    before, after = (
        safetensors_io.read(tmp_path / "pruned/model.safetensors"),
        safetensors_io.read(tmp_path / "out/model.safetensors"),
    )
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    old, new = Checkpoint.open(tmp_path / "pruned"), Checkpoint.open(tmp_path / "out")
    if words["format"] != "dense":
        assert old.layers == new.layers and len(old.layers) == 14
        for name in old.layers:
            a, b = old.layer(name), new.layer(name)
            assert torch.equal(a.kept, b.kept) and not b.dequantize()[~a.kept].any()
            assert not torch.equal(a.values, b.values)
    was, now = lmpress.load(tmp_path / "pruned"), lmpress.load(tmp_path / "out")
    if words["format"] == "dense":
        for name, parameter in was.named_parameters():
            if "proj" in name:
                assert (
                    torch.equal(parameter == 0, now.get_parameter(name) == 0) and (parameter == 0).float().mean() == 0.5
                )
    with torch.no_grad():
        target = lmpress.load(tiny)(IDS).logits.log_softmax(-1)
        gaps = [(target.exp() * (target - m(IDS).logits.log_softmax(-1))).sum(-1).mean() for m in (was, now)]
    assert gaps[1] < gaps[0]


def test_what_counts_as_pruned(tiny: Path) -> None:
    student = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[:8] = 0  # a third
        student.model.layers[1].mlp.up_proj.weight[0, 0] = 0
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    assert pruned_masks(student, DistillConfig()).keys() == {first}
    assert pruned_masks(student, DistillConfig(keep_zeros=True)).keys() == {first, second}
    assert not pruned_masks(student, DistillConfig(keep_zeros=False))
    with pytest.raises(UsageError, match="adapters would fill its zeros"):
        pruned_masks(student, DistillConfig(lora=4))


@pytest.mark.parametrize(
    ("made", "words", "why"),
    [
        ("tiny", {}, "its own teacher"),
        ("pruned", {"drop": 1}, "its zeros stay"),
        ("pruned", {"options": {"keep_zeros": False}}, "its zeros stay"),
        ("quantized", {}, "quantized: what is trained"),
        ("quantized", {"drop": 1}, "quantized: what is trained"),
    ],
)
def test_refusals(tiny: Path, tmp_path: Path, text: str, made: str, words: dict[str, Any], why: str) -> None:
    if made == "pruned":
        lmpress.prune(tiny, tmp_path / "pruned", method="magnitude", format="bitmask", calib=text)
    if made == "quantized":
        lmpress.quantize(tiny, tmp_path / "quantized", method="rtn", bits=2, group_size=8)
    teacher = {} if made == "tiny" else {"teacher": tiny}
    with pytest.raises(UsageError, match=why):
        lmpress.distill(tmp_path / made, tmp_path / "out", data=text, samples=32, seq_len=16, **teacher, **words)
    assert not list(tmp_path.glob("*out*"))


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="lora must be greater than or equal to 0, got -1"):
        DistillConfig(lora=-1)

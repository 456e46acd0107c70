"""Knowledge distillation: exact terms for an identical student, training, resuming after a kill, zeros that stay zero."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lmpress.compress.distill.feature_hooks import attention_scores
from lmpress.compress.distill.knowledge import loss_terms, train
from lmpress.compress.distill.training_state import TrainingState
from lmpress.errors import UsageError
from lmpress.recipes.training import DistillConfig

IDS = torch.randint(2, 12, (24, 10), generator=torch.Generator().manual_seed(0))
CONFIG = DistillConfig(steps=12, batch=4, rate=5e-3, hidden=1.0, attention=1.0, checks=4)


def model(layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def shallower(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    student = model(2)
    state = {k.replace("layers.2.", "layers.1."): v for k, v in teacher.state_dict().items() if "layers.1." not in k}
    student.load_state_dict(state)
    return student


def test_the_terms_of_an_identical_student() -> None:
    teacher, pairs = model(), [(0, 0), (1, 1), (2, 2)]
    with torch.no_grad():
        terms = loss_terms(model(), teacher, IDS, pairs, CONFIG)
    assert float(terms.hidden) == 0 and float(terms.attention) == 0
    with torch.no_grad():
        logs = teacher(IDS).logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1).mean()
    assert float(terms.logits) == float(terms.entropy) == pytest.approx(float(entropy), rel=1e-6)


def test_the_terms_against_their_formulas() -> None:
    teacher = model()
    student = shallower(teacher)
    config = replace(CONFIG, temperature=2.0)
    with torch.no_grad():
        terms = loss_terms(student, teacher, IDS, [(0, 0), (1, 2)], config)
    with torch.no_grad():
        theirs = teacher(IDS, output_hidden_states=True)
        ours = student(IDS, output_hidden_states=True)
    wanted, given = ((out.logits.double() / 2).softmax(-1) for out in (theirs, ours))
    assert float(terms.logits) == pytest.approx(float(-4 * (wanted * given.log()).sum(-1).mean()), rel=1e-5)
    a, b = ours.hidden_states[1].double(), theirs.hidden_states[1].double()
    first = ((a - b).square().sum(-1) / b.square().sum(-1)).mean()
    assert float(first) == 0  # the first layers are the same
    assert float(terms.hidden) > 0 and float(terms.attention) > 0


def test_scores_are_the_logarithms_of_the_attention_weights() -> None:
    teacher = model()
    with torch.no_grad(), attention_scores(teacher) as scores:
        teacher(IDS)
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        weights = teacher(IDS, output_attentions=True).attentions
    causal = torch.full((10, 10), -torch.inf).triu(1)
    assert len(scores) == 3
    for score, weight in zip(scores, weights, strict=True):
        assert torch.allclose((score + causal).softmax(-1), weight, atol=1e-6)


def trained(folder: Path, config: DistillConfig = CONFIG) -> tuple[PreTrainedModel, list[tuple[int, float, float]]]:
    folder.mkdir(exist_ok=True)
    teacher = model()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    student = shallower(teacher)
    history = train(student, teacher, IDS[8:], IDS[:8], [(0, 0), (1, 2)], config, TrainingState(folder))
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    return student, history.curve


def test_the_loss_falls_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    student, curve = trained(tmp_path / "run")
    losses = [loss for _, loss, _ in curve]
    assert min(losses) < 0.9 * losses[0]
    with torch.no_grad():
        terms = loss_terms(student, model(), IDS[:8], [(0, 0), (1, 2)], CONFIG)
    assert float(terms.loss(CONFIG)) == pytest.approx(min(losses), rel=1e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", replace(CONFIG, steps=2))
    parts, _ = trained(tmp_path / "parts", replace(CONFIG, steps=2, accumulate=2))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_resumed_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(event: object) -> None:
        raise Killed

    through, curve = trained(tmp_path / "through")
    teacher, folder = model(), tmp_path / "killed"
    folder.mkdir()
    student = shallower(teacher)
    with pytest.raises(Killed):
        train(student, teacher, IDS[8:], IDS[:8], [(0, 0), (1, 2)], CONFIG, TrainingState(folder), kill)
    resumed, again = trained(folder)
    assert again == curve
    for a, b in zip(through.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_zeros_stay(tmp_path: Path) -> None:
    teacher = model()
    student = model()
    masks: dict[str, Tensor] = {}
    for name, module in student.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            masks[name] = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
            module.weight.data.masked_fill_(masks[name], 0)
    config = replace(CONFIG, keep_zeros=True)
    history = train(student, teacher, IDS[8:], IDS[:8], [(0, 0), (1, 1), (2, 2)], config, TrainingState(tmp_path))
    assert history.best_step > 0
    for name, mask in masks.items():
        weight = student.get_submodule(name).weight
        assert not weight[mask].any() and weight[~mask].all()


@pytest.mark.parametrize(
    "options",
    [{"batch": 5, "accumulate": 2}, {"rate": 0.0}, {"hidden": -1.0}, {"precision": "int8"}, {"temperature": 0.0}],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        replace(CONFIG, **options)


COMMAND = [sys.executable, "-m", "lmpress.cli", "distill"]


def test_a_killed_command_resumes_to_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 400 + "hgfedcba" * 400)
    options = ["--keep-layers", "1", "--choice", "influence", "--data", str(text), "--samples", "48", "--seq-len", "16"]
    options += ["--steps", "40", "--checks", "20", "--threads", "1", "--quiet"]
    subprocess.run([*COMMAND, str(tiny), "-o", str(tmp_path / "through"), *options], check=True)
    command = [*COMMAND, str(tiny), "-o", str(tmp_path / "killed"), *options]
    process = subprocess.Popen(command)
    state = tmp_path / ".killed.distill" / "state.safetensors"
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    subprocess.run(command, check=True)
    for file in (tmp_path / "through").iterdir():
        if file.name != "report.json":  # it contains times and its own path
            assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file.name
    assert not state.parent.exists()
    report = json.loads((tmp_path / "killed/report.json").read_text())
    assert len(report["kept"]) == 1 and report["bytes_after"] < report["bytes_before"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "killed", dtype=torch.float32)
    assert len(loaded.model.layers) == 1

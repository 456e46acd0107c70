"""Block tuning and LKD in the pipeline: the held-out loss of every block falls; only codes, scales and zeros change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Adam
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lmpress
from lmpress.calibrate.data.token_rows import calibration_rows
from lmpress.calibrate.model.skeleton import build
from lmpress.calibrate.runner import Runner
from lmpress.compress import pipeline
from lmpress.compress.block import Block
from lmpress.compress.formats.source import open_source
from lmpress.compress.formats.tokenizer import load_tokenizer
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.methods.reconstruct import lkd, loop, tune
from lmpress.compress.methods.reconstruct.learnable import LearnableQuantizer
from lmpress.compress.methods.reconstruct.loop import Target, original_outputs, reconstruct
from lmpress.compress.pipeline import RunReport
from lmpress.compress.plan import make_plan
from lmpress.errors import UsageError
from lmpress.recipes import schema
from lmpress.recipes.schema import Recipe

WEIGHTS = {"bits": 2, "symmetric": False, "strategy": "group", "group_size": 8}
PASSES = {"tune": {"steps": 40, "rate": 0.05, "hard": 0.02}, "lkd": {"steps": 40, "rate": 0.01, "hard": 0.02}}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("abcdefghhgfedcbaacegbdfh" * 60)
    return str(tmp_path / "text.txt")


def recipe(text: str, *later: str, first: str = "gptq", weights: dict[str, Any] = WEIGHTS, **options: Any) -> Recipe:
    passes = [{"method": first, "scheme": {"weights": weights}}]
    passes += [{"method": name, **PASSES[name], **options} for name in later]
    return schema.build({"passes": passes, "calibration": {"data": text, "samples": 32, "seq_len": 16}})


def loaded(model: Path, scratch: Path, text: str) -> tuple[Runner, Block]:
    """The first block of the model, rounded to nearest, with its inputs."""
    source = open_source(model)
    skeleton = build(source)
    plan = make_plan(source, skeleton, recipe(text))
    rows = calibration_rows(text, load_tokenizer(model), 32, 16)
    runner = Runner(skeleton, source, rows, scratch, reference=True, small_batches=True)
    runner.capture()
    module = runner.load(0)
    linears = pipeline._linears(runner.block_name(0), module, plan)
    block = Block(runner.block_name(0), module, linears, io=runner.io(0))
    for linear in block.linears:
        linear.result = round_to_nearest(linear.weight, linear.grid_args)
    return runner, block


@pytest.mark.parametrize("name", ["tune", "lkd"])
@pytest.mark.parametrize("first", ["rtn", "gptq"])
def test_the_held_out_loss_falls_in_every_block(tiny: Path, tmp_path: Path, text: str, name: str, first: str) -> None:
    report = lmpress.run(tiny, tmp_path / "out", recipe(text, name, first=first))
    for layer in report.layers:
        assert float(layer["block_loss"]) < float(layer["block_loss_before"]) and layer["best_step"] != 0


def test_transposed_layouts_are_trained_too(tmp_path: Path, text: str, letters: PreTrainedTokenizerFast) -> None:
    """GPT-2's layers store their weights as `[in, out]`; c_attn and c_fc are not square."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=10, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, initializer_range=0.3
            )
        )
    model.save_pretrained(tmp_path / "gpt2")
    letters.save_pretrained(tmp_path / "gpt2")
    report = lmpress.run(tmp_path / "gpt2", tmp_path / "out", recipe(text, "tune"))
    assert len(report.layers) == 8
    assert all(float(layer["block_loss"]) < float(layer["block_loss_before"]) for layer in report.layers)


@pytest.mark.parametrize("name", ["tune", "lkd"])
def test_only_codes_scales_and_zeros_change(tiny: Path, tmp_path: Path, text: str, name: str) -> None:
    lmpress.run(tiny, tmp_path / "plain", recipe(text))
    lmpress.run(tiny, tmp_path / "learned", recipe(text, name))
    one, other = open_source(tmp_path / "plain"), open_source(tmp_path / "learned")
    assert {n: t.spec for n, t in one.tensors.items()} == {n: t.spec for n, t in other.tensors.items()}
    changed = {n for n in one.tensors if not torch.equal(one.read(n), other.read(n))}
    assert changed and all(".weight_" in n for n in changed)
    assert any(n.endswith("weight_packed") for n in changed)
    assert any(n.endswith("weight_scale") for n in changed) == (name == "tune")
    ids = torch.arange(1, 9).unsqueeze(0)
    assert lmpress.load(tmp_path / "learned")(input_ids=ids).logits.isfinite().all()


def test_a_repeated_run_gives_the_same_bytes(tiny: Path, tmp_path: Path, text: str) -> None:
    for name in ("one", "two"):
        lmpress.run(tiny, tmp_path / name, recipe(text, "tune"))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("name", ["tune", "lkd"])
def test_neither_the_original_nor_the_block_is_modified(tiny: Path, tmp_path: Path, text: str, name: str) -> None:
    _, block = loaded(tiny, tmp_path, text)
    assert block.io is not None
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (block.module, block.io.original)]
    method, config = (tune, tune.Tune(steps=8)) if name == "tune" else (lkd, lkd.LKD(steps=8))
    method.apply(config, block)  # type: ignore[arg-type]
    for module, state in zip((block.module, block.io.original), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


def test_a_training_that_does_not_improve_keeps_the_quantizers_result(tiny: Path, tmp_path: Path, text: str) -> None:
    _, block = loaded(tiny, tmp_path, text)
    before = [linear.result for linear in block.linears]
    tune.apply(tune.Tune(steps=8, rate=1e-9, scale_rate=30.0), block)
    assert {linear.figures["best_step"] for linear in block.linears} == {0}
    for linear, result in zip(block.linears, before, strict=True):
        assert linear.result is not None and result is not None
        assert torch.equal(linear.result.dequantize(), result.dequantize())


def test_the_result_is_the_error_on_held_out_batches(tiny: Path, tmp_path: Path, text: str) -> None:
    """Recomputed with the resulting weights in the module, on the batches that are held out."""
    _, block = loaded(tiny, tmp_path, text)
    io, block.seed = block.io, 5
    assert io is not None and len(io) == 8
    quantizers = {name: LearnableQuantizer(x.weight, x.result) for name, x in block.local().items()}  # type: ignore[arg-type]
    optimiser = Adam([quantizer.offset for quantizer in quantizers.values()], lr=0.02)
    read: list[int] = []
    target = Target(io.inputs, original_outputs(io, io.reference))
    spied = target.inputs.__getitem__

    class Spy:
        def __getitem__(self, i: int) -> torch.Tensor:
            read.append(i)
            return spied(i)

    result = reconstruct(block, quantizers, Target(Spy(), target.targets), optimiser, steps=24)  # type: ignore[arg-type]
    held_out = read[0]
    assert held_out == int(torch.randperm(8, generator=torch.Generator().manual_seed(5))[0])
    checks = read.count(held_out)
    assert checks == 1 + loop.CHECKS and len(read) == checks + 24 and set(read) == set(range(8))
    for name, linear in block.local().items():
        assert linear.result is not None
        block.module.get_submodule(name).weight.data.copy_(linear.result.dequantize())
    with torch.no_grad():
        given = io.calls[held_out].replay(block.module, io.inputs[held_out])
    wanted = target.targets[held_out]
    relative = (given - wanted).double().norm(dim=-1).square() / wanted.double().norm(dim=-1).square()
    assert result.after == pytest.approx(float(relative.mean()), rel=1e-5)
    assert result.after < result.before


def test_lkd_reads_the_original_hidden_states(tiny: Path, tmp_path: Path, text: str) -> None:
    """So its result for the second block does not depend on the weights of the first."""
    results = []
    for keep in ((), ("*.0.*",)):
        out = tmp_path / f"out{len(keep)}"
        lmpress.run(tiny, out, recipe(text, "lkd", first="rtn").model_copy(update={"keep": keep}))
        stored = open_source(out)
        results.append({n: stored.read(n) for n in stored.tensors if ".1." in n})
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_random_tokens_replace_missing_data(tiny: Path, tmp_path: Path) -> None:
    report: RunReport = lmpress.run(tiny, tmp_path / "out", recipe("random-tokens", "lkd", first="zeroquant"))
    assert all(float(layer["block_loss"]) < float(layer["block_loss_before"]) for layer in report.layers)
    rows = calibration_rows("random-tokens", load_tokenizer(tiny), 200, 16, seed=3)
    assert rows.ids.shape == (200, 16) and set(rows.ids[:, 0].tolist()) == {1}
    assert set(rows.ids.flatten().tolist()) == set(range(10))
    assert torch.equal(rows.ids, calibration_rows("random-tokens", load_tokenizer(tiny), 200, 16, seed=3).ids)


def test_weights_without_a_plain_grid_are_refused(tiny: Path, tmp_path: Path, text: str) -> None:
    _, block = loaded(tiny, tmp_path, text)
    block.linears[2].result = None
    with pytest.raises(UsageError, match=r"v_proj is not quantized to a plain grid"):
        tune.apply(tune.Tune(steps=1), block)


def test_tuning_needs_something_to_start_from() -> None:
    with pytest.raises(UsageError, match="nothing to improve on"):
        schema.build({"passes": [{"method": "tune"}]})


@pytest.mark.parametrize(
    "make",
    [
        lambda: tune.Tune(steps=0),
        lambda: tune.Tune(rate=0),
        lambda: tune.Tune(hard=0.3),
        lambda: lkd.LKD(rate=0),
        lambda: lkd.LKD(hard=0),
    ],
)
def test_invalid_options_are_refused(make: Any) -> None:
    with pytest.raises(UsageError):
        make()

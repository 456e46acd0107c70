"""`prune` from end to end: exact sizes, what loads where, and the note that dense files are not smaller."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lmpress
from lmpress.calibrate.model.architecture import find_blocks, find_linears, weight_of
from lmpress.compress import pipeline
from lmpress.errors import UsageError
from lmpress.kernels.modules.linear import PrunedLinear
from lmpress.recipes.naming import default_out
from lmpress.recipes.options import pruning_recipe


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "letters.txt"
    generator = torch.Generator().manual_seed(0)
    file.write_text("".join("abcdefgh"[i] for i in torch.randint(0, 8, (4000,), generator=generator)))
    return str(file)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    prefix, blocks = find_blocks(model)
    return {
        f"{prefix}.{i}.{name}": weight_of(linear).detach()
        for i, block in enumerate(blocks)
        for name, linear in find_linears(block).items()
    }


@pytest.mark.parametrize("storage", ["dense", "bitmask", "2:4"])
@pytest.mark.parametrize("method", ["exactobs", "sparsegpt", "magnitude"])
def test_sizes_are_as_planned_and_the_result_loads(
    tiny: Path, text: str, tmp_path: Path, method: str, storage: str
) -> None:
    recipe = pruning_recipe(method=method, pattern="2:4", format=storage, calib=text, samples=8, seq_len=32)
    planned = pipeline.plan(tiny, recipe)
    report = lmpress.run(tiny, tmp_path / "out", recipe)
    files = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert planned.bytes_after == report.bytes_after == files
    model = lmpress.load(tmp_path / "out")
    if storage == "dense":
        served = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
        assert files == sum(f.stat().st_size for f in tiny.glob("*.safetensors"))
    else:
        served = {n: m.compressed.dequantize() for n, m in model.named_modules() if isinstance(m, PrunedLinear)}
        with pytest.raises((ValueError, ImportError)):  # instead of loading random weights
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(served) == 14
    for weight in served.values():
        assert ((weight == 0).view(-1, 4).sum(1) == 2).all()
    logits = model(torch.tensor([[1, 2, 3, 4]])).logits
    assert logits.isfinite().all()


def test_the_storages_serve_the_same_function(tiny: Path, text: str, tmp_path: Path) -> None:
    outputs = []
    for storage in ("dense", "bitmask", "2:4"):
        out = tmp_path / storage.replace(":", "")
        lmpress.prune(
            tiny, out, method="wanda", pattern="2:4", format=storage, calib=text, samples=4, seq_len=32,
            options={"dtype": "float16"},
        )  # fmt: skip
        outputs.append(lmpress.load(out)(torch.tensor([[1, 5, 3, 2]])).logits)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.allclose(outputs[1], outputs[2], atol=1e-5)


def test_conv1d_layers_keep_their_layout(tmp_path: Path, text: str, letters) -> None:
    config = GPT2Config(vocab_size=10, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    letters.save_pretrained(tmp_path / "gpt2")
    outputs = []
    for storage in ("dense", "bitmask"):
        out = tmp_path / storage
        lmpress.prune(
            tmp_path / "gpt2", out, sparsity=0.4, format=storage, calib=text, samples=4, seq_len=32,
            options={"dtype": "float16"},
        )  # fmt: skip
        outputs.append(lmpress.load(out)(torch.tensor([[1, 5, 3, 2]])).logits)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    for weight in weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)).values():
        assert (weight == 0).double().mean() == pytest.approx(0.4, abs=0.01)


def test_dense_files_claim_no_saving(tiny: Path) -> None:
    dense = pipeline.plan(tiny, pruning_recipe(method="magnitude"))
    masked = pipeline.plan(tiny, pruning_recipe(method="magnitude", format="bitmask", options={"dtype": "float32"}))
    before, after = (sum(layer.nbytes for layer in planned.layers) for planned in (dense, masked))
    assert dense.notes == [
        f"zeros in a dense file save nothing; --format bitmask makes these layers {1 - after / before:.0%} smaller"
    ]
    assert not pipeline.plan(tiny, pruning_recipe(method="magnitude", format="bitmask")).notes
    tenth = pipeline.plan(tiny, pruning_recipe(method="magnitude", sparsity=0.01)).notes
    assert tenth == ["zeros in a dense file save nothing"]  # a bitmask would take more than it saves


def test_names_and_contradictions(tiny: Path) -> None:
    assert default_out(tiny, pruning_recipe(sparsity=0.6)).name == "tiny-exactobs-s60"
    assert default_out(tiny, pruning_recipe(pattern="2:4")).name == "tiny-exactobs-2of4"
    with pytest.raises(UsageError, match="not both"):
        pruning_recipe(sparsity=0.5, pattern="2:4")
    with pytest.raises(UsageError):
        pruning_recipe(sparsity=0.5, format="zip")


def test_overrides_change_the_sparsity_of_layers(tiny: Path, tmp_path: Path) -> None:
    recipe = pruning_recipe(method="magnitude", sparsity=0.5, format="bitmask")
    recipe = recipe.model_copy(update={"overrides": {"*.down_proj": {"sparsity": 0.25}}})
    report = lmpress.run(tiny, tmp_path / "out", recipe)
    found = {str(layer["name"]): layer["sparsity"] for layer in report.layers}
    assert all(value == pytest.approx(0.25 if "down" in name else 0.5) for name, value in found.items())
    assert report.plan.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert lmpress.load(tmp_path / "out")(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_interrupted_runs_resume(tiny: Path, text: str, tmp_path: Path) -> None:
    """Finished blocks are read back from their sparse form."""
    recipe = pruning_recipe(method="sparsegpt", sparsity=0.5, format="bitmask", calib=text, samples=4, seq_len=32)

    def stop(event) -> None:
        if event.phase == "load" and event.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lmpress.run(tiny, tmp_path / "out", recipe, observer=stop)
    lmpress.run(tiny, tmp_path / "out", recipe)
    lmpress.run(tiny, tmp_path / "straight", recipe)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "straight")]
    assert files[0] == files[1]


@pytest.mark.parametrize("storage", ["dense", "bitmask"])
def test_blocks_are_pruned_as_a_whole(tiny: Path, text: str, tmp_path: Path, storage: str) -> None:
    options = {"calib": text, "samples": 8, "seq_len": 32}
    recipe = pruning_recipe(pattern="1x4", sparsity=0.3, format=storage, **options)
    planned = pipeline.plan(tiny, recipe)
    report = lmpress.run(tiny, tmp_path / "out", recipe)
    assert planned.bytes_after == report.bytes_after
    assert default_out(tiny, recipe).name.endswith("-exactobs-s30-1x4")
    if storage == "dense":
        for weight in weights(lmpress.load(tmp_path / "out")).values():
            zeros = (weight == 0).view(len(weight), -1, 4).sum(2)
            assert set(zeros.unique().tolist()) == {0, 4}
            assert int((zeros == 4).sum()) == -(-zeros.numel() * 3 // 10)
    with pytest.raises(UsageError, match="wanda does not prune in blocks"):
        pipeline.plan(tiny, pruning_recipe(method="wanda", pattern="1x4", **options))
    with pytest.raises(UsageError, match="1x0"):
        pruning_recipe(pattern="1x0")
    ragged = pipeline.plan(tiny, pruning_recipe(pattern="1x7", **options))
    assert any("do not fit" in note for note in ragged.notes)

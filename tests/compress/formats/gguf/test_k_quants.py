"""Q4_K and Q6_K as schemes: solved on their own grid, planned to the byte, stored packed, exported without a loss."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lmpress
from lmpress.calibrate.model.skeleton import build
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.compress.formats.gguf import blocks
from lmpress.compress.formats.source import open_source
from lmpress.compress.plan import make_plan
from lmpress.compress.runtime_support import check
from lmpress.errors import UsageError
from lmpress.kernels.modules.linear import PackedLinear
from lmpress.kernels.tensor import BlockTensor, of_grid
from lmpress.kernels.tensor.grid import Grid, groups_of
from lmpress.recipes.options.quantize import QuantizeOptions
from lmpress.recipes.scheme import QuantArgs

SUPER = {"formula": "ggml", "scale_dtype": "super"}
Q4_K: dict[str, Any] = {"bits": 4, "symmetric": False, "group_size": 32}
Q6_K: dict[str, Any] = {"bits": 6, "symmetric": True, "group_size": 16}
KINDS = {"Q4_K": Q4_K, "Q6_K": Q6_K}
IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def model(folder: Path, hidden: int = 256, inner: int = 512) -> Path:
    """A random Llama with 2 blocks."""
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, max_position_embeddings=32, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    characters = Tokenizer(models.WordLevel({chr(32 + index): index for index in range(64)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, unk_token=" ").save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("k-quants"))


def args(kind: str, **more: Any) -> QuantArgs:
    return QuantArgs(**KINDS[kind], **SUPER, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_grid_is_multiples_of_float16_and_codes_are_nearest(kind: str, observer: str) -> None:
    weight = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[2, :256] = 0  # a super-block of nothing
    weight[3, 256:300] = weight[3, 256:300].abs()  # and groups on one side of zero
    grid = Grid.fit(weight, args(kind, observer=observer))
    assert grid.units is not None
    unit = grid.units.scale.repeat_interleave(groups_of(grid.args), 1)
    multiples = grid.scale.double() / unit.double()
    assert torch.equal(multiples, multiples.round()) and torch.equal(unit.half().float(), unit)
    largest = 127 if grid.args.symmetric else 63
    assert (multiples.abs() >= 1).all() and (multiples.abs() <= largest).all()
    tensor = of_grid(grid.quantize(weight), grid)
    assert isinstance(tensor, BlockTensor)
    assert torch.allclose(tensor.dequantize(), grid.dequantize(tensor.codes), rtol=0, atol=1e-7)
    best = (tensor.dequantize() - weight).abs()
    for code in range(grid.args.maxq + 1):
        other = grid.dequantize(torch.full_like(tensor.codes, code))
        assert (best <= (other - weight).abs() + 1e-7).all()
    assert not tensor.dequantize()[2, :256].any()


@pytest.mark.parametrize("kind", KINDS)
def test_searching_multiples_loses_less_than_the_nearest_ones(kind: str) -> None:
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(2))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(3)) ** 4

    def error(observer: str) -> float:
        grid = Grid.fit(weight, args(kind, observer=observer), importance)
        return float(((grid.dequantize(grid.quantize(weight)) - weight).square() * importance).sum())

    assert error("mse") < 0.9 * error("minmax")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq", "obq"])
def test_what_is_solved_is_stored_loaded_and_exported_bit_for_bit(
    letters: Path, tmp_path: Path, kind: str, method: str
) -> None:
    calib = {} if method == "rtn" else {"calib": "random-tokens", "samples": 8, "seq_len": 16}
    if method == "obq":
        calib["keep"] = ("*.1.*", "*mlp*", "*q_proj", "*k_proj")  # it takes long
    wanted = QuantizeOptions(method=method, options=SUPER, **KINDS[kind], **calib).recipe()
    plan = make_plan(open_source(letters), build(open_source(letters)), wanted)
    report = lmpress.run(letters, tmp_path / "q", wanted)
    assert (tmp_path / "q" / "model.safetensors").stat().st_size == plan.bytes_after == report.plan.bytes_after
    bits = {"Q4_K": 4.5, "Q6_K": 6.5625}[kind]
    assert plan.bits_per_weight == bits
    exported = lmpress.export(tmp_path / "q", tmp_path / "gguf", format="gguf")
    assert not [note for note in exported.notes if "round" in note]
    file = {t.name: t for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    ours, theirs = Checkpoint.open(tmp_path / "q"), Checkpoint.open(tmp_path / "gguf")
    layer = "model.layers.0.self_attn.o_proj"  # its rows are not permuted for rotary embeddings
    packed = file["blk.0.attn_output.weight"]
    assert packed.tensor_type.name == kind
    assert torch.equal(torch.from_numpy(dequantize(packed.data, packed.tensor_type)), ours.layer(layer).dequantize())
    for name in ours.layers:
        assert torch.equal(ours.layer(name).dequantize(), theirs.layer(name).dequantize())
    served = lmpress.load(tmp_path / "q")
    assert isinstance(served.get_submodule(layer), PackedLinear)
    logits, loaded = served(IDS).logits, lmpress.load(tmp_path / "gguf")
    assert torch.equal(loaded(IDS).logits, logits)
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(foreign(IDS).logits, logits, rtol=0, atol=1e-5)


def test_another_process_reads_the_codes_as_they_are_stored(letters: Path, tmp_path: Path) -> None:
    lmpress.quantize(letters, tmp_path / "q", method="rtn", options=SUPER, **Q4_K)
    (finding,) = lmpress.verify(tmp_path / "q", runtime=["lmpress"]).findings
    assert finding.ok and finding.steps is not None and finding.steps < 1e-4


def test_rows_that_no_super_block_fills_get_the_block_that_llama_cpp_gives_them(tmp_path: Path) -> None:
    small = model(tmp_path, hidden=256, inner=288)
    wanted = QuantizeOptions(method="rtn", options=SUPER, **Q4_K).recipe()
    plan = make_plan(open_source(small), build(open_source(small)), wanted)
    assert len(plan.notes) == 1 and "Q4_K's super-block of 256 does not divide 288: Q5_0 is used" in plan.notes[0]
    lmpress.run(small, tmp_path / "q", wanted)
    assert (tmp_path / "q" / "model.safetensors").stat().st_size == plan.bytes_after
    lmpress.export(tmp_path / "q", tmp_path / "gguf", format="gguf")
    file = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert (file["blk.1.ffn_up.weight"], file["blk.1.ffn_down.weight"]) == ("Q4_K", "Q5_0")
    assert torch.equal(lmpress.load(tmp_path / "gguf")(IDS).logits, lmpress.load(tmp_path / "q")(IDS).logits)
    assert QuantArgs(**Q6_K, **SUPER).for_width(96).block == "Q8_0"


def test_impossible_requests_are_refused_with_a_remedy(tmp_path: Path) -> None:
    odd = model(tmp_path, inner=200)
    with pytest.raises(UsageError, match=r"mlp.down_proj cannot be stored: no GGUF block holds rows of 200.*--keep"):
        lmpress.quantize(odd, tmp_path / "q", method="rtn", options=SUPER, **Q4_K)
    with pytest.raises(UsageError, match="no block of 4 bits in groups of 128"):
        QuantizeOptions(method="rtn", bits=4, symmetric=False, options=SUPER).recipe()
    with pytest.raises(UsageError, match="scale_dtype 'super' needs gguf_blocks weights"):
        QuantizeOptions(method="rtn", options={"scale_dtype": "super"}).recipe()
    with pytest.raises(UsageError, match=r"zeroquant does not make .* weights; use method gptq or rtn or obq"):
        QuantizeOptions(method="zeroquant", options=SUPER, **Q6_K).recipe()
    with pytest.raises(UsageError, match="Q4_1 can be read, not quantized to"):
        QuantizeOptions(method="rtn", options={"formula": "ggml"}, **Q4_K).recipe()
    with pytest.raises(UsageError, match="scales together; use groups=static"):
        QuantizeOptions(method="gptq", options=SUPER | {"groups": "dynamic", "order": "group"}, **Q4_K).recipe()
    assert not (tmp_path / "q").exists()


def test_only_targets_that_read_blocks_accept_them() -> None:
    from lmpress.compress.plan import LayerPlan

    layers = [LayerPlan("m.0.up_proj", 0, "Linear", (512, 256), args("Q4_K"), 0)]
    check(layers, ["lmpress", "llamacpp", "gguf-transformers"])
    with pytest.raises(UsageError, match="cannot hold gguf_blocks weights"):
        check(layers, ["vllm"])


def test_every_block_has_the_arguments_that_choose_it() -> None:
    for block in blocks.BLOCKS:
        assert blocks.kind(blocks.arguments(block), 256) == block

"""Packed checkpoints in plain transformers and in `lmpress.load`, against the model with our dequantized weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.calibrate.model.architecture import find_linears, set_weight
from lmpress.compress.formats.source import open_source
from lmpress.errors import CompressError, UsageError
from lmpress.kernels.modules.linear import PackedLinear

IDS = torch.randint(0, 10, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llama(tmp_path: Path, letters: PreTrainedTokenizerFast) -> Path:
    """Widths 64 and 172: groups of 32 divide only the first."""
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    letters.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def compressed(model: Path, **options: Any) -> Path:
    out = model.parent / "out"
    lmpress.quantize(model, out, method="rtn", **{"group_size": 32, **options})
    return out


def dequantized(model: Path, out: Path) -> PreTrainedModel:
    """The original model with weights that are dequantized from the checkpoint by the formula of the format."""
    dense, stored = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), open_source(out).tensors
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    replaced = 0
    for group in config["config_groups"].values():
        weights = group["weights"]
        for name, linear in find_linears(dense).items():
            if f"{name}.weight_packed" not in stored or not {name, "Linear"} & set(group["targets"]):
                continue
            tensors = {n.rpartition(".")[2]: each.read() for n, each in stored.items() if n.startswith(f"{name}.")}
            set_weight(linear, weight_of_tensors(tensors, weights["num_bits"]))
            replaced += 1
    assert replaced == sum(name.endswith(".weight_packed") for name in stored)
    return dense


def weight_of_tensors(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """Scale times (code minus zero), element by element from the stored words."""
    rows, columns = tensors["weight_shape"].tolist()
    scale = tensors["weight_scale"].double()
    codes = torch.tensor([stream(row, bits, columns) for row in tensors["weight_packed"].tolist()])
    zero = torch.full(scale.shape, 2 ** (bits - 1))
    if "weight_zero_point" in tensors:
        zero = torch.tensor([stream(column, bits, rows) for column in tensors["weight_zero_point"].T.tolist()]).T
    group = columns // scale.shape[1]
    return (codes - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)


def stream(words: list[int], bits: int, count: int) -> list[int]:
    number = int.from_bytes(b"".join(word.to_bytes(4, "little", signed=True) for word in words), "little")
    return [number >> bits * k & 2**bits - 1 for k in range(count)]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-3 * (expected.max() - expected.min()))


def plainly(path: Path) -> PreTrainedModel:
    """As any user of transformers loads it; keys that do not fit are an error."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # compressed-tensors' own deprecations
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [32, -1], ids=["mixed-groups", "channel"])
def test_symmetric_checkpoints_load_in_plain_transformers(llama: Path, bits: int, size: int) -> None:
    out = compressed(llama, bits=bits, group_size=size)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == (2 if size == 32 else 1)
    expected = logits(dequantized(llama, out))
    assert close(logits(plainly(out)), expected)
    assert bits == 8 or not close(logits(AutoModelForCausalLM.from_pretrained(llama).eval()), expected)


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_with_dense_layers_load(llama: Path) -> None:
    out = compressed(llama, keep=["*.0.mlp.down_proj", "*.q_proj"])
    assert close(logits(plainly(out)), logits(dequantized(llama, out)))
    assert close(logits(lmpress.load(out)), logits(dequantized(llama, out)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["stories260K", "babyllama-105", "sample"])
def test_trained_models_load_in_plain_transformers(
    assets: Path, pytestconfig: pytest.Config, tmp_path: Path, model: str
) -> None:
    path = pytestconfig.rootpath / "examples/sample_model" if model == "sample" else assets / "models" / model
    out = tmp_path / "out"
    lmpress.quantize(path, out, method="rtn", group_size=32)
    expected = logits(dequantized(path, out))
    assert close(logits(plainly(out)), expected)
    assert close(logits(lmpress.load(out)), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_our_loader_serves_the_dequantized_weights(llama: Path, bits: int, symmetric: bool) -> None:
    out = compressed(llama, bits=bits, symmetric=symmetric)
    model = lmpress.load(out)
    assert close(logits(model), logits(dequantized(llama, out)))
    assert not model.training and model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_stay_packed_in_memory(llama: Path) -> None:
    model = lmpress.load(compressed(llama, bits=4))
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 14
    logits(model)
    held = sum(t.nbytes for linear in linears for t in [*linear.buffers(), *linear.parameters()])
    dense = sum(4 * linear.in_features * linear.out_features for linear in linears)
    assert held < 0.18 * dense  # codes, scales as stored and as the kernel reads them (groups of 32 here)
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    assert names == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_computes_in_the_requested_dtype(llama: Path, dtype: torch.dtype) -> None:
    out = compressed(llama)
    found, expected = logits(lmpress.load(out, dtype=dtype)), logits(lmpress.load(out))
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 0.05 * (expected.max() - expected.min())


def damage(out: Path, change: Any) -> None:
    tensors = safetensors_io.read(out / "model.safetensors")
    change(tensors)
    safetensors_io.write(out / "model.safetensors", tensors)


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_zero_point"])
def test_a_missing_part_is_named(llama: Path, part: str) -> None:
    out = compressed(llama, symmetric=False)
    damage(out, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    with pytest.raises(CompressError, match=rf"holds no tensor for {LAYER}\.{part}; the checkpoint is incomplete"):
        lmpress.load(out)


@pytest.mark.parametrize("name", [f"{LAYER}.weight_packed", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_weight_is_named(llama: Path, name: str) -> None:
    out = compressed(llama)
    damage(out, lambda tensors: tensors.pop(name))
    with pytest.raises(CompressError, match=rf"holds no tensor for {name.replace('_packed', '')}"):
        lmpress.load(out)


@pytest.mark.parametrize("name", [f"{LAYER}.weight_packed", f"{LAYER}.weight_scale", "model.norm.weight"])
def test_a_wrong_shape_is_named(llama: Path, name: str) -> None:
    out = compressed(llama)
    damage(out, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(CompressError, match=rf"{name} .*do not (match|belong together)"):
        lmpress.load(out)


@pytest.mark.parametrize("shape", [[64, 171], [2**62, 2**62], [-64, 172], [172, 64]])
def test_a_stored_shape_that_lies_is_named_before_anything_is_unpacked(llama: Path, shape: list[int]) -> None:
    out = compressed(llama)
    damage(out, lambda tensors: tensors.update({f"{LAYER}.weight_shape": torch.tensor(shape)}))
    with pytest.raises(CompressError, match=rf"{LAYER}\.weight_shape is"):
        lmpress.load(out)


def test_a_packed_layer_that_the_model_lacks_is_named(llama: Path) -> None:
    out = compressed(llama)
    config = json.loads((out / "config.json").read_text()) | {"num_hidden_layers": 1}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match=r"packs model\.layers\.1\S+, which is not a layer"):
        lmpress.load(out)


def test_scales_that_are_not_finite_are_named(llama: Path) -> None:
    out = compressed(llama)
    damage(out, lambda tensors: tensors[f"{LAYER}.weight_scale"].fill_(torch.inf))
    with pytest.raises(CompressError, match=rf"{LAYER}\.weight_scale .*NaN or infinite"):
        lmpress.load(out)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {},
    ],
    ids=["gptq", "awq", "bitsandbytes", "empty"],
)
def test_foreign_quantizations_are_refused(llama: Path, quantization: object) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": quantization}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="is quantized in a way that lmpress does not read"):
        lmpress.load(llama)


def test_integer_weights_are_not_read_as_real_numbers(llama: Path) -> None:
    """`int-quantized` keeps int8 codes under the name `weight`: read as values they would be garbage."""
    out = compressed(llama, bits=8, group_size=-1)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format"] = "int-quantized"
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "int-quantized"
    (out / "config.json").write_text(json.dumps(config))
    damage(out, lambda t: [t.update({n.replace("_packed", ""): t.pop(n)}) for n in list(t) if n.endswith("_packed")])
    with pytest.raises(UsageError, match="does not read"):
        lmpress.load(out)


def test_dense_models_lacking_a_tensor_are_refused(llama: Path) -> None:
    damage(llama, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CompressError, match=r"has missing or mismatched tensors: model\.norm\.weight"):
        lmpress.load(llama)


def test_a_generation_config_that_cannot_be_used_is_named(tiny: Path) -> None:
    for content in ("3", "[" * 50_000, '{"max_length": {}, "cache_implementation": 3}'):
        (tiny / "generation_config.json").write_text(content)
        with pytest.raises(CompressError, match=r"generation_config\.json"):
            lmpress.load(tiny)


def test_a_pattern_of_layers_that_is_not_supported_is_named(llama: Path) -> None:
    out = compressed(llama)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [r"re:^(([a-z_.0-9])*)*\1#$"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"config|quantized in a way .*pattern .* is not supported from character"):
        lmpress.load(out)

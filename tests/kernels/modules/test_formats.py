"""Every packed format, loaded and asked for 64 tokens: the answer of the model with the dequantized weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

import lmpress
from lmpress.compress.activations import decompose, fake_quantize
from lmpress.compress.errors import UsageError
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.compress.tensor import CompressedTensor, MixedTensor
from lmpress.eval.served import served
from lmpress.kernels import dispatch
from lmpress.kernels.modules.linear import Serving, kernels_of, serve
from lmpress.kernels.modules.low_rank import LowRankLinear
from lmpress.recipes.schema import Recipe

TEXT = "data/tinystories/valid.jsonl"
CALIBRATION = {"samples": 8, "seq_len": 128}
W3 = {"weights": {"bits": 3, "strategy": "group", "group_size": 32}}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "pack-quantized, 4 bits": ("quantize", {"method": "rtn", "bits": 4, "group_size": 32}),
    "pack-quantized, 3 bits asymmetric": ("quantize", {"method": "rtn", "bits": 3, "group_size": 32, "symmetric": False}),
    "pack-quantized, 8 bits per row": ("quantize", {"method": "rtn", "bits": 8, "group_size": -1}),
    "pack-quantized, 2 bits": ("quantize", {"method": "rtn", "bits": 2, "group_size": 16}),
    "nf4": ("quantize", {"method": "nf4"}),
    "low-rank": ("run", {}),
    "spqr": ("quantize", {"method": "spqr", "quality": "fast", **CALIBRATION}),
    "int-quantized, per token": ("quantize", {"method": "smoothquant", "level": "O1", **CALIBRATION}),
    "int-quantized, per tensor": ("quantize", {"method": "smoothquant", "level": "O2", **CALIBRATION}),
    "int-quantized, static": ("quantize", {"method": "smoothquant", "level": "O3", **CALIBRATION}),
    "bitmask": ("prune", {"method": "magnitude", "sparsity": 0.5, "format": "bitmask"}),
    "2:4": ("prune", {"method": "magnitude", "pattern": "2:4", "format": "2:4"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Path]:
    return {}


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, assets: Path, checkpoints, tmp_path_factory) -> Path:
    """The checkpoint of a format, made once."""
    name = request.param
    if name not in checkpoints:
        command, options = (FORMATS | ROUNDING)[name]
        out = tmp_path_factory.mktemp("formats") / "out"
        if command == "run":
            passes = [{"method": "rtn", "scheme": W3}, {"method": "lorc", "rank": 4}]
            options = {"recipe": Recipe(passes=passes, calibration={"data": str(assets / TEXT), **CALIBRATION})}
        elif options["method"] not in ("rtn", "nf4", "magnitude"):
            options = options | {"calib": str(assets / TEXT)}
        level = {"options": {"level": options["level"]}} if "level" in options else {}
        options = {key: value for key, value in options.items() if key != "level"}
        getattr(lmpress, command)(assets / "models/stories260K", out, **options, **level)
        checkpoints[name] = out
    return checkpoints[name]


# Inputs that are rounded to int8 turn the last bit of a sum into a step of a code sooner or later: no test of equal answers.
ROUNDING = {"llm.int8": ("quantize", {"method": "llm-int8", **CALIBRATION})}


each_format = pytest.mark.parametrize("checkpoint", FORMATS, indirect=True)


def dequantized(path: Path) -> PreTrainedModel:
    """The model with plain linear layers in place of the packed ones, their inputs rounded where the format says so."""
    model, stored = lmpress.load(path), Checkpoint.open(path)
    for name in stored.layers:
        tensor, packed = stored.layer(name), model.get_submodule(name)
        bias = packed.inner.bias if isinstance(packed, LowRankLinear) else packed.bias
        linear = nn.Linear(*reversed(tensor.shape), bias=bias is not None)
        linear.weight = nn.Parameter(tensor.dequantize(), requires_grad=False)
        linear.bias = bias
        if isinstance(tensor, CompressedTensor) and tensor.inputs is not None:
            rounding = (tensor.inputs, tensor.input_grid)
            linear.register_forward_pre_hook(lambda module, args, by=rounding: (fake_quantize(args[0], *by),))
        if isinstance(tensor, MixedTensor):
            apart = (tensor.inputs, tensor.columns)
            linear.register_forward_pre_hook(lambda module, args, by=apart: (decompose(args[0], *by),))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return model


def answer(model: PreTrainedModel, assets: Path) -> torch.Tensor:
    prompt = AutoTokenizer.from_pretrained(assets / "models/stories260K")("Once upon a time", return_tensors="pt")
    return model.generate(**prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)


@each_format
@torch.no_grad()
def test_greedy_answers_are_those_of_the_dequantized_weights(checkpoint: Path, assets: Path) -> None:
    expected = answer(dequantized(checkpoint), assets)
    model = lmpress.load(checkpoint)
    assert torch.equal(answer(model, assets), expected)
    serving = set()
    for kernel in dispatch.KERNELS:
        try:
            serve(model, Serving(kernel=kernel.name))
        except UsageError:
            continue  # it is not for this format, or not for this machine
        serving.add(kernel.name)
        assert {name.split()[0] for name in kernels_of(model)} == {kernel.name}
        assert torch.equal(answer(model, assets), expected), kernel.name
    assert "torch-dequantize" in serving


@pytest.mark.parametrize("checkpoint", FORMATS | ROUNDING, indirect=True)
def test_what_inspect_names_is_what_is_loaded(checkpoint: Path) -> None:
    """Without a look at the weights: no layer asks for what was not tested then."""
    named = served(checkpoint)
    tested = dispatch.refusal.cache_info().misses
    chosen = kernels_of(lmpress.load(checkpoint))
    assert dispatch.refusal.cache_info().misses == tested
    for name, count in chosen.items():
        assert count == sum(each.count for each in named if f"{each.kernel} {each.inputs}" == name)


@pytest.mark.parametrize("checkpoint", ROUNDING, indirect=True)
@torch.no_grad()
def test_predictions_are_those_of_the_dequantized_weights_with_rounded_inputs(checkpoint: Path, assets: Path) -> None:
    model, reference = lmpress.load(checkpoint), dequantized(checkpoint)
    tokens = answer(reference, assets)
    expected, found = (each(tokens).logits.double().log_softmax(-1) for each in (reference, model))
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-5
    assert (expected.argmax(-1) == found.argmax(-1)).double().mean() > 0.95


@pytest.mark.parametrize(
    "checkpoint", sorted((FORMATS | ROUNDING).keys() - {"low-rank"}), indirect=True
)  # two modules, one layer
@torch.no_grad()
def test_casts_and_copies_keep_what_is_served(checkpoint: Path) -> None:
    model = lmpress.load(checkpoint)
    before = {name: module.compressed for name, module in model.named_modules() if hasattr(module, "compressed")}
    stored = Checkpoint.open(checkpoint)
    model.half().float()
    for name, tensor in before.items():
        module = model.get_submodule(name)
        assert torch.equal(module.compressed.dequantize(), tensor.dequantize())
        assert torch.equal(module.compressed.dequantize(), stored.layer(name).dequantize())
        assert module.compressed.args == tensor.args
    assert before

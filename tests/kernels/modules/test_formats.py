"""Every packed format generates the same 64 tokens as the model with the dequantized weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import lmpress
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.compress.formats.tokenizer import load_tokenizer
from lmpress.errors import UsageError
from lmpress.eval.dispatch_report import served
from lmpress.kernels import dispatch
from lmpress.kernels.activations import decompose, fake_quantize
from lmpress.kernels.modules.embedding import PackedEmbedding
from lmpress.kernels.modules.linear import Serving, kernels_of, serve
from lmpress.kernels.modules.low_rank import LowRankLinear
from lmpress.kernels.tensor import CompressedTensor, OutlierColumnsTensor
from lmpress.recipes.schema import build

SAMPLE = Path(__file__).parents[3] / "examples" / "sample_model"
TEXT = "data/tinystories/valid.jsonl"
SUPER = {"formula": "ggml", "scale_dtype": "super"}


@dataclass(frozen=True)
class Way:
    """To a checkpoint of a format: the passes of a recipe, the model that they are for, what they leave is exported to."""

    passes: tuple[dict[str, Any], ...]
    calibrated: bool = False
    sample: bool = False
    export: str | None = None
    embedding: dict[str, Any] | None = None


def grouped(bits: int, symmetric: bool = True, group_size: int = 32, **more: Any) -> dict[str, Any]:
    return {"bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": group_size} | more


def nearest(weights: dict[str, Any], **more: Any) -> Way:
    return Way(({"method": "rtn", "scheme": {"weights": weights}},), **more)


def smooth(strategy: str, dynamic: bool) -> Way:
    signed = {"bits": 8, "group_size": None, "formula": "signed"}
    scheme = {"weights": signed | {"strategy": "tensor"}, "inputs": signed | {"strategy": strategy, "dynamic": dynamic}}
    return Way(({"method": "smoothquant"}, {"method": "rtn", "scheme": scheme}), calibrated=True)


def pruned(**weights: Any) -> Way:
    return Way(({"method": "magnitude", "scheme": {"weights": weights}},))


FORMATS: dict[str, Way] = {
    **{f"pack-quantized, {bits} bits": nearest(grouped(bits)) for bits in (2, 3, 4, 8)},
    **{f"pack-quantized, {bits} bits asymmetric": nearest(grouped(bits, False)) for bits in (2, 3, 4, 8)},
    "pack-quantized, 8 bits per row": nearest({"bits": 8, "strategy": "channel", "group_size": None}),
    "packed embedding": nearest(grouped(4), embedding=grouped(5)),
    "gptq, g_idx": nearest(grouped(4), sample=True, export="gptq"),
    "awq": nearest(grouped(4, False), sample=True, export="awq"),
    "gguf, Q4_0": nearest(grouped(4), sample=True, export="gguf"),
    "gguf, Q6_K": nearest(grouped(6, group_size=16, **SUPER), sample=True, export="gguf"),
    "blocks, Q4_K": nearest(grouped(4, False, **SUPER), sample=True),
    "nf4": Way(({"method": "nf4"},)),
    "low-rank": Way(({"method": "rtn", "scheme": {"weights": grouped(3)}}, {"method": "lorc", "rank": 4}), calibrated=True),
    "spqr": Way(({"method": "spqr"},), calibrated=True),
    "int-quantized, per token": smooth("token", dynamic=True),
    "int-quantized, per tensor": smooth("tensor", dynamic=True),
    "int-quantized, static": smooth("tensor", dynamic=False),
    "bitmask": pruned(sparsity=0.5, storage="bitmask"),
    "2:4": pruned(sparsity=0.5, pattern="2:4", storage="2:4"),
}  # fmt: skip

# Inputs that are rounded to int8 turn the last bit of a sum into a step of a code sooner or later: no test of equal answers
# against sums of floats (test_mixed.py has one against the arithmetic that is documented).
ROUNDING = {"llm.int8": Way(({"method": "llm-int8", "solve": True},), calibrated=True)}


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Path]:
    return {}


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, checkpoints, tmp_path_factory) -> Path:
    """The checkpoint of a format, made once."""
    name = request.param
    way = (FORMATS | ROUNDING)[name]
    assets = None if way.sample else request.getfixturevalue("assets")
    if name not in checkpoints:
        out = tmp_path_factory.mktemp("formats") / "out"
        recipe: dict[str, Any] = {"passes": list(way.passes), "embedding": way.embedding}
        if way.calibrated:
            recipe["calibration"] = {"data": str(assets / TEXT), "samples": 8, "seq_len": 128}
        lmpress.run(assets / "models/stories260K" if assets else SAMPLE, out, build(recipe))
        if way.export is not None:
            lmpress.export(out, out.parent / way.export, format=way.export)
            out = out.parent / way.export
        checkpoints[name] = out
    return checkpoints[name]


each_format = pytest.mark.parametrize("checkpoint", FORMATS, indirect=True)


def dequantized(path: Path) -> PreTrainedModel:
    """The model with plain layers in place of the packed ones, their inputs rounded if the format rounds them."""
    model, stored = lmpress.load(path), Checkpoint.open(path)
    for name, source in sources(stored).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _plain(stored.layer(source), model.get_submodule(name)))
    return model


def sources(stored: Checkpoint) -> dict[str, str]:
    """Each packed layer and the one that it is stored as."""
    tied = {} if stored.tied_head is None else {stored.tied_head: stored.embedding}
    return {name: name for name in stored.layers} | tied


def _plain(tensor: Any, packed: nn.Module) -> nn.Module:
    """An ordinary module in the place of `packed`, which serves `tensor`."""
    weight = nn.Parameter(tensor.dequantize(), requires_grad=False)
    if isinstance(packed, PackedEmbedding):
        return nn.Embedding.from_pretrained(weight)
    linear = nn.Linear(*reversed(tensor.shape))
    linear.weight, linear.bias = weight, packed.inner.bias if isinstance(packed, LowRankLinear) else packed.bias
    if isinstance(tensor, CompressedTensor) and tensor.inputs is not None:
        rounding = (tensor.inputs, tensor.input_grid)
        linear.register_forward_pre_hook(lambda module, args: (fake_quantize(args[0], *rounding),))
    if isinstance(tensor, OutlierColumnsTensor):
        linear.register_forward_pre_hook(lambda module, args: (decompose(args[0], tensor.inputs, tensor.columns),))
    return linear


def answer(model: PreTrainedModel, path: Path) -> torch.Tensor:
    prompt = load_tokenizer(path)("Once upon a time", return_tensors="pt")
    return model.generate(prompt.input_ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)


@each_format
@torch.no_grad()
def test_greedy_answers_are_those_of_the_dequantized_weights(checkpoint: Path) -> None:
    expected = answer(dequantized(checkpoint), checkpoint)
    model = lmpress.load(checkpoint)
    assert torch.equal(answer(model, checkpoint), expected)
    serving = set()
    for kernel in dispatch.KERNELS:
        try:
            serve(model, Serving(kernel=kernel.name))
        except UsageError:
            continue  # it is not for this format, or not for this machine
        serving.add(kernel.name)
        assert {name.split()[0] for name in kernels_of(model)} == {kernel.name}
        assert torch.equal(answer(model, checkpoint), expected), kernel.name
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
def test_predictions_are_those_of_the_dequantized_weights_with_rounded_inputs(checkpoint: Path) -> None:
    model, reference = lmpress.load(checkpoint), dequantized(checkpoint)
    tokens = answer(reference, checkpoint)
    expected, found = (each(tokens).logits.double().log_softmax(-1) for each in (reference, model))
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-5
    assert (expected.argmax(-1) == found.argmax(-1)).double().mean() > 0.95


@pytest.mark.parametrize(
    "checkpoint", sorted((FORMATS | ROUNDING).keys() - {"low-rank"}), indirect=True
)  # two modules, one layer
@torch.no_grad()
def test_casts_and_copies_keep_what_is_served(checkpoint: Path) -> None:
    model = lmpress.load(checkpoint)
    stored = Checkpoint.open(checkpoint)
    stored_as = sources(stored)
    before = {name: model.get_submodule(name).compressed for name in stored_as}
    model.half().float()
    for name, tensor in before.items():
        module = model.get_submodule(name)
        assert torch.equal(module.compressed.dequantize(), tensor.dequantize())
        assert torch.equal(module.compressed.dequantize(), stored.layer(stored_as[name]).dequantize())
        assert module.compressed.args == tensor.args
    assert before

"""Layers that are not quantized stay in 16 bits, compute as float32 would, and are held once if they are tied."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lmpress
from lmpress.kernels import dispatch
from lmpress.kernels.kernel import KernelSpec
from lmpress.kernels.modules.dense import DenseEmbedding, DenseLinear
from lmpress.kernels.modules.linear import Serving, kernels_of, serve
from lmpress.kernels.reference import REFERENCE

IDS = torch.tensor([[3, 5, 7, 4, 9, 12]])
Make = Callable[..., PreTrainedModel]

pytestmark = pytest.mark.skipif(
    dispatch.choose(KernelSpec.pruned(torch.bfloat16)).kernel is REFERENCE, reason="no compiled kernel runs here"
)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def packed(request: pytest.FixtureRequest, make_model: Make, tmp_path: Path) -> Callable[[str], Path]:
    """Rounds a random model, stored in 16 bits, to 4 bits and gives the folder."""

    def make(architecture: str, **changes: object) -> Path:
        make_model(architecture, **changes).to(request.param).save_pretrained(tmp_path / architecture)
        lmpress.quantize(tmp_path / architecture, tmp_path / "packed", method="rtn", bits=4, group_size=16)
        return tmp_path / "packed"

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "phi", "gemma2", "mixtral", "bloom"])
def test_logits_are_those_of_float32(packed: Callable[..., Path], architecture: str, tied: bool) -> None:
    folder = packed(architecture, tie_word_embeddings=tied)
    model = lmpress.load(folder)
    dense = [module for module in model.modules() if isinstance(module, DenseLinear | DenseEmbedding)]
    assert any(isinstance(module, DenseLinear) for module in dense)
    wide = copy.deepcopy(model)
    for name, module in list(wide.named_modules()):
        if isinstance(module, DenseLinear):
            plain: nn.Module = nn.Linear(module.in_features, module.out_features)
            plain.weight, plain.bias = nn.Parameter(module.rows.float()), module.bias  # type: ignore[assignment]
        elif isinstance(module, DenseEmbedding):
            plain = nn.Embedding.from_pretrained(module.rows.float())
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(wide.get_submodule(parent), leaf, plain)
    assert torch.allclose(logits(model), logits(wide), rtol=0, atol=1e-5 * float(logits(wide).abs().max()))
    assert all(module.rows.dtype.itemsize == 2 for module in dense)


def test_a_tied_table_is_held_once(packed: Callable[..., Path]) -> None:
    model = lmpress.load(packed("llama", tie_word_embeddings=True))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, DenseEmbedding)
    assert isinstance(head, DenseLinear)
    assert table.rows.data_ptr() == head.rows.data_ptr()


@torch.no_grad()
def test_casts_and_copies(packed: Callable[..., Path]) -> None:
    model = lmpress.load(packed("llama"))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    parts = nn.Sequential(model.get_input_embeddings(), model.get_output_embeddings())
    expected = parts(IDS)
    assert parts.to(torch.bfloat16)(IDS).dtype == torch.bfloat16
    assert torch.equal(parts.to(torch.float32)(IDS), expected)


def test_dense_layers_are_not_counted_and_no_kernel_is_forced_on_them(packed: Callable[..., Path]) -> None:
    model = lmpress.load(packed("llama"))
    assert sum(kernels_of(model).values()) == 14
    expected = logits(model)
    serve(model, Serving(kernel="torch-dequantize"))
    assert set(kernels_of(model)) == {"torch-dequantize float"}
    assert torch.allclose(logits(model), expected, atol=1e-4)


def test_other_dtypes_are_computed_in_as_before(packed: Callable[..., Path]) -> None:
    model = lmpress.load(packed("llama"), dtype=torch.bfloat16)
    assert type(model.get_output_embeddings()) is nn.Linear

"""The sample model, packed: whole answers through the kernels, not single products."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import lmpress
from lmpress.kernels import dispatch
from lmpress.kernels.kernel import KernelSpec
from lmpress.kernels.modules.linear import Serving, kernels_of, serve

SAMPLE = Path(__file__).parents[3] / "examples" / "sample_model"
PROMPT = "def quicksort(items):\n    if len(items) < 2:\n"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    out = tmp_path_factory.mktemp("packed") / "w4"
    lmpress.quantize(SAMPLE, out, method="rtn", bits=4, group_size=32)
    return lmpress.load(out)


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return AutoTokenizer.from_pretrained(SAMPLE)(PROMPT, return_tensors="pt").input_ids


def test_exact_kernels_answer_as_the_dequantized_weights_do(packed: PreTrainedModel, prompt: torch.Tensor) -> None:
    answers = {}
    for kernel in dispatch.KERNELS:
        if dispatch.refusal(kernel, KernelSpec(4, 32)) is None:
            serve(packed, Serving(kernel=kernel.name))
            assert set(kernels_of(packed)) == {f"{kernel.name} float"}
            answers[kernel.name] = packed.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    expected = answers["torch-dequantize"]
    assert expected.shape[1] == prompt.shape[1] + 64
    assert [name for name, answer in answers.items() if not torch.equal(answer, expected)] == []


@torch.no_grad()
def test_int8_activations_hardly_change_the_predictions(packed: PreTrainedModel, prompt: torch.Tensor) -> None:
    serve(packed, Serving())
    exact = packed(prompt).logits.double().log_softmax(-1)
    serve(packed, Serving(exact=False))
    quick = packed(prompt).logits.double().log_softmax(-1)
    divergence = (exact.exp() * (exact - quick)).sum(-1).mean()
    assert 0 < divergence < 1e-3

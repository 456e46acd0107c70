"""LLM.int8's product against the arithmetic that is documented: integers exactly, and whole answers token by token."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import lmpress
from lmpress.compress.formats.checkpoint import Checkpoint
from lmpress.errors import UsageError
from lmpress.kernels import dispatch
from lmpress.kernels.kernel import KernelSpec
from lmpress.kernels.modules.linear import Serving, kernels_of, serve
from lmpress.kernels.outliers import prepare
from lmpress.kernels.tensor import OutlierColumnsTensor
from lmpress.kernels.weight import Weight

NEED = KernelSpec(8, 200, activations="token", parts=("columns",))
HERE = [kernel for kernel in dispatch.KERNELS if dispatch.refusal(kernel, NEED) is None]
# The margin of each token of these two answers is 0.05 at least, a hundred times what rounding in another order does to a
# logit, but for a code that takes the next step; and they need the columns and, the second, the threshold.
PROMPTS = ["Max found a", "It was a cold day"]


@pytest.mark.parametrize("kernel", HERE, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("threshold", [0.0, 128.0])
@pytest.mark.parametrize("batch", [1, 3, 8, 70])
def test_whole_numbers_are_multiplied_exactly(kernel, threshold: float, batch: int) -> None:
    """Scales are powers of two and all sums fit a float's 24 bits: nothing is rounded, so nothing may differ."""
    generator = torch.Generator().manual_seed(batch)
    codes = torch.randint(0, 256, (37, 200), generator=generator, dtype=torch.uint8)
    columns, loud = torch.tensor([0, 77, 199]), 11
    outliers = torch.randint(-64, 64, (37, 3), generator=generator) / 8
    x = torch.randint(-127, 128, (batch, 200), generator=generator)
    x[:, 5] = 127  # the scale of every token is one
    x[:, columns] *= 3
    x[:, loud] = 100
    if threshold:
        x[-1, loud] = -200
    weight = Weight(codes, torch.full((37, 1), 1 / 8), None, 8, 200, None, columns, outliers.half(), threshold)
    eighths = codes.long() - 128
    eighths[:, columns] = (outliers * 8).long()
    y = prepare(kernel, weight, KernelSpec.of(weight, "token"))(x.float())
    assert torch.equal(y, (x @ eighths.T).float() / 8)


class Documented(nn.Module):
    """The product as docs/methods/llm-int8.md has it, in float64; without `parts` of it, for comparison."""

    def __init__(self, tensor: OutlierColumnsTensor, parts: frozenset[str]) -> None:
        super().__init__()
        self.tensor, self.parts = tensor, parts
        self.weight = tensor.codes.double() - 128
        self.scale = tensor.scale.double().T

    def forward(self, inputs: Tensor) -> Tensor:
        x, tensor = inputs.flatten(0, -2).double(), self.tensor
        kept = loud = torch.zeros(x.shape[1], dtype=torch.bool)
        if "columns" in self.parts:
            kept = kept.index_fill(0, tensor.columns, True)
        if "threshold" in self.parts:
            loud = (x.abs() >= tensor.inputs.threshold).any(0) & ~kept
        quiet = x.masked_fill(kept | loud, 0)
        step = (quiet.float().abs().amax(1, keepdim=True) / 127).double()
        codes = (quiet / step.masked_fill(step == 0, 1)).round()
        y = codes @ self.weight.T * step * self.scale + x[:, loud] @ self.weight[:, loud].T * self.scale
        if "columns" in self.parts:
            y += x[:, tensor.columns] @ tensor.outliers.double().T
        return y.to(inputs.dtype).unflatten(0, inputs.shape[:-1])


def documented(path: Path, *parts: str) -> PreTrainedModel:
    model, stored = lmpress.load(path), Checkpoint.open(path)
    for name in stored.layers:
        parent, _, leaf = name.rpartition(".")
        tensor = stored.layer(name)
        assert isinstance(tensor, OutlierColumnsTensor)
        setattr(model.get_submodule(parent), leaf, Documented(tensor, frozenset(parts)))
    return model


@torch.no_grad()
def test_greedy_answers_are_those_of_the_documented_arithmetic(assets: Path, tmp_path: Path) -> None:
    original, data = assets / "models" / "stories260K-outlier", assets / "data" / "tinystories" / "valid.jsonl"
    options = {"method": "llm-int8", "quality": "fast", "samples": 8, "seq_len": 128}
    lmpress.quantize(original, tmp_path / "out", calib=str(data), **options)
    tokenizer = AutoTokenizer.from_pretrained(original)
    prompts = [tokenizer(text, return_tensors="pt") for text in PROMPTS]

    def answers(model: PreTrainedModel) -> list[list[int]]:
        asked = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        return [model.generate(**prompt, **asked)[0].tolist() for prompt in prompts]

    expected = answers(documented(tmp_path / "out", "columns", "threshold"))
    assert answers(documented(tmp_path / "out", "threshold"))[0] != expected[0]
    assert answers(documented(tmp_path / "out", "columns"))[1] != expected[1]
    model, served = lmpress.load(tmp_path / "out"), []
    for kernel in dispatch.KERNELS:
        try:
            serve(model, Serving(kernel=kernel.name))
        except UsageError:
            continue  # it is not for this machine
        assert set(kernels_of(model)) == {f"{kernel.name} token"}
        assert answers(model) == expected, kernel.name
        served.append(kernel.name)
    assert "torch-dequantize" in served

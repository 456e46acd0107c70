"""Refusals of the plan: a checkpoint that the run could not read later is refused from its headers alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.compress.run import Run
from lmpress.errors import CompressError
from lmpress.recipes.schema import parse

RECIPE = parse("passes: [{method: rtn, scheme: {weights: {group_size: 8}}}]", "here")
Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"holds no tensor for model\.norm\.weight"),
        (lambda tensors: tensors.pop("model.embed_tokens.weight"), r"holds no tensor for model\.embed_tokens\.weight"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(16, dtype=torch.int64)}),
            r"model\.norm\.weight in .*model\.safetensors holds int64, expected floats",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(15)}),
            r"model\.norm\.weight has shape \(15,\) in the checkpoint, \(16,\) by its config",
        ),
    ],
    ids=["no norm", "no embedding", "a norm of integers", "a short norm"],
)
def test_incomplete_checkpoints_are_refused_before_any_work(
    tiny: Path, tmp_path: Path, change: Change, message: str
) -> None:
    tensors = safetensors_io.read(tiny / "model.safetensors")
    change(tensors)
    safetensors_io.write(tiny / "model.safetensors", tensors)
    with pytest.raises(CompressError, match=message):
        Run.of(tiny, RECIPE, tmp_path / "out")
    with pytest.raises(CompressError, match=message):
        lmpress.quantize(tiny, tmp_path / "out", method="rtn", group_size=8)
    assert not any(file.name.startswith((".out", "out")) for file in tmp_path.iterdir())

"""Fixtures for reduced models: loading them with transformers, with no weight missing, and their logits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    return model.eval()


def ask(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.fixture
def loaded() -> Callable[[Path], PreTrainedModel]:
    """Loads the model in a folder, whose files must contain exactly the weights that it needs."""
    return load


@pytest.fixture
def logits() -> Callable[[PreTrainedModel, Tensor], Tensor]:
    """Computes the logits of a model on rows of tokens."""
    return ask

"""Low-rank adapters (LoRA, Hu et al. 2021), trained instead of all parameters and merged into the weights at the end."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...calibrate.model.architecture import find_blocks, find_linears
from ...errors import UsageError


def attach_adapters(student: PreTrainedModel, rank: int, seed: int) -> Callable[[], object]:
    """Freeze `student` and add an adapter of `rank`, which alone is trained, to every linear layer of its blocks.

    Untrained adapters do not change the model's output. Their products are scaled by 2. Returns a function that merges them
    into the weights and restores the plain modules. Raises `UsageError` if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise UsageError("--lora needs the package peft", "pip install 'lmpress[lora]'") from error
    prefix, blocks = find_blocks(student)
    linears = {f"{prefix}.{name}": module for name, module in find_linears(blocks).items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(linears),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linears.values()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(student, config)
    return adapted.merge_and_unload  # pyright: ignore[reportCallIssue] delegated to the tuner

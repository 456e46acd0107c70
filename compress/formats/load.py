"""Load a model directory: packed checkpoints with the weights packed in memory, others as transformers does."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ...calibrate.skeleton import Names, device_of, materialise
from ...calibrate.source import Source, open_source
from ...kernels.linear import Serving
from ...kernels.replace import replace_linear
from ..errors import CompressError
from .checkpoint import Checkpoint


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    exact: bool = True,
    kernel: str | None = None,
) -> PreTrainedModel:
    """The causal language model at `path` (a directory or hub id), in eval mode, computing in `dtype` on `device`.

    Packed layers compute what their dequantized weights would; `exact` False lets their inputs become int8 codes, which is
    faster and off by a few thousandths: for generation, not for measurements. `kernel` forces one by name.

    Raises `UsageError` for what is no model directory or holds a format that lmpress does not read and for a kernel that
    cannot serve here, `CompressError` where a tensor is missing, damaged or of another shape than the config says.
    """
    device_of(device)
    source = open_source(path)
    if "quantization_config" not in source.config:
        return _load_dense(source, device, dtype)
    return _load_packed(source, device, Serving(exact, kernel, dtype))


def _load_dense(source: Source, device: str, dtype: torch.dtype) -> PreTrainedModel:
    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise CompressError(f"{source.path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    model, info = loaded
    wrong = [*sorted(info["missing_keys"]), *(str(key) for key in info["mismatched_keys"])]
    if wrong:
        raise CompressError(f"{source.path} lacks or mismatches {', '.join(wrong[:3])}", "the checkpoint is incomplete")
    return model.to(device).eval()


def _load_packed(source: Source, device: str, serving: Serving) -> PreTrainedModel:
    checkpoint = Checkpoint.open(source, serving.dtype)
    model = checkpoint.model
    for name in checkpoint.layers:
        replace_linear(model, name, checkpoint.layer(name), serving, device)
    materialise(model, "", source, Names(model, source), device)
    model.tie_weights()
    return model

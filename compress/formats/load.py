"""Load a model directory: packed checkpoints with the weights packed in memory, others as transformers does."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ...calibrate.skeleton import Names, build, materialise
from ...calibrate.source import Source, open_source
from ...kernels.linear import replace_linear
from ..errors import CompressError, UsageError
from ..scheme import QuantArgs
from . import pack_quantized, spqr
from .storage import format_of

MARKERS = (".weight_packed", ".weight_tiles")  # every packed layer has one of these


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal language model at `path` (a directory or hub id), in eval mode, computing in `dtype` on `device`.

    Raises `UsageError` for what is no model directory or holds a format that lmpress does not read, `CompressError` where
    a tensor is missing, damaged or of another shape than the config says.
    """
    source = open_source(path)
    if "quantization_config" not in source.config:
        return _load_dense(source, device, dtype)
    return _load_packed(source, device, dtype)


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


def _load_packed(source: Source, device: str, dtype: torch.dtype) -> PreTrainedModel:
    model = build(source, dtype)
    layers = [name.rpartition(".")[0] for name in source.tensors if name.endswith(MARKERS)]
    try:
        arguments = _arguments(source, layers)
    except (KeyError, TypeError, ValueError) as error:
        kind = source.config["quantization_config"].get("quant_method", "unknown")
        raise UsageError(f"{source.path} is quantized in a way that lmpress does not read ({kind}: {error})") from error
    for name, args in arguments.items():
        stored = format_of(args)
        parts = [f"{name}.{s}" for s in stored.SUFFIXES if f"{name}.{s}" in source.tensors]
        replace_linear(model, name, stored.unpack(name, {p: source.read(p, check=True) for p in parts}, args))
    materialise(model, "", source, Names(model, source), device)
    model.tie_weights()
    return model


def _arguments(source: Source, layers: list[str]) -> dict[str, QuantArgs]:
    """The arguments of every packed layer by the checkpoint's config."""
    config = source.config["quantization_config"]
    if config.get("format") == spqr.NAME:
        return spqr.read_config(config, layers)
    scales = {name: source.tensors[f"{name}.weight_scale"].spec.torch_dtype for name in layers}
    return pack_quantized.read_config(config, layers, scales)

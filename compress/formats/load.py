"""Load a model directory: packed checkpoints with the weights packed in memory, others as transformers does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ...calibrate.discovery import find_linears, weight_of
from ...calibrate.skeleton import Names, build, device_of, materialise
from ...calibrate.source import Source, open_source
from ...kernels.linear import Serving, replace_linear
from ..errors import CompressError, UsageError
from ..scheme import QuantArgs, WeightArgs
from ..tensor import Compressed
from . import int_quantized
from .storage import Format, format_of, format_that_wrote

UNRELATED = "the checkpoint and its config do not belong together"


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
    model = build(source, serving.dtype)
    linears = find_linears(model)
    arguments, inputs = _arguments(source)
    for name, args in arguments.items():
        weight = _read_layer(linears.get(name), name, args, source, format_of(args, inputs))
        replace_linear(model, name, weight, serving, device)
    materialise(model, "", source, Names(model, source), device)
    model.tie_weights()
    return model


def _arguments(source: Source) -> tuple[Mapping[str, WeightArgs], QuantArgs | None]:
    """How every packed layer was compressed, by the checkpoint's config, and how their inputs are quantized."""
    config = source.config["quantization_config"]
    try:
        stored = {name: tensor.spec for name, tensor in source.tensors.items()}
        inputs = int_quantized.read_inputs(config, stored) if int_quantized.wrote(config) else None
        return format_that_wrote(config).read_config(config, stored), inputs
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{source.path} is quantized in a way that lmpress does not read ({error})",
            "load it with the tool that made it, or start from the original model",
        ) from error


def _read_layer(linear: nn.Module | None, name: str, args: WeightArgs, source: Source, stored: Format) -> Compressed:
    """The packed weight of layer `name`, once all its tensors are there and have the shapes that the model asks for."""
    if linear is None:
        raise CompressError(f"{source.path} packs {name}, which is no linear layer of its config.json", UNRELATED)
    shape = weight_of(linear).shape
    specs = stored.spec(name, args, *shape)
    for tensor, expected in specs.items():
        if tensor not in source.tensors:
            raise CompressError(f"{source.path} holds no tensor for {tensor}", "the checkpoint is incomplete")
        found = source.tensors[tensor].spec
        if found != expected:
            raise CompressError(f"{tensor} is {found}, and {expected} by its config.json", UNRELATED)
    weight = stored.unpack(name, {tensor: source.read(tensor, check=True) for tensor in specs}, args)
    if weight.shape != shape:
        raise CompressError(f"{name}.weight_shape is {weight.shape}, and {tuple(shape)} by its config.json", UNRELATED)
    return weight

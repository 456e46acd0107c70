"""Load a model directory: packed checkpoints with the weights packed in memory, others as transformers does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ...calibrate.discovery import find_linears, weight_of
from ...calibrate.skeleton import Names, build, device_of, materialise
from ...calibrate.source import Source, open_source
from ...kernels.linear import replace_linear
from ..errors import CompressError, UsageError
from ..scheme import WeightArgs
from ..tensor import CompressedTensor, PrunedTensor
from . import int_quantized, sparse
from . import pack_quantized as packed
from .choice import Format, format_for

PACKED, WEIGHT = ".weight_packed", ".weight"
UNRELATED = "the checkpoint and its config do not belong together"


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal language model at `path` (a directory or hub id), in eval mode, computing in `dtype` on `device`.

    Raises `UsageError` for what is no model directory or holds a format that lmpress does not read, `CompressError` where
    a tensor is missing, damaged or of another shape than the config says.
    """
    device_of(device)
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
    stored_as, arguments = _arguments(source)
    for name, args in arguments.items():
        replace_linear(model, name, _read_layer(model, name, args, source, stored_as))
    materialise(model, "", source, Names(model, source), device)
    model.tie_weights()
    return model


def _arguments(source: Source) -> tuple[Format, Mapping[str, WeightArgs]]:
    """The format of the checkpoint, and how each layer is compressed."""
    layers = [name.removesuffix(PACKED) for name in source.tensors if name.endswith(PACKED)]
    layers += [n.removesuffix(WEIGHT) for n, t in source.tensors.items() if n.endswith(WEIGHT) and t.spec.dtype == "I8"]
    stored = {name: source.tensors.get(f"{name}.weight_scale") for name in layers}
    scales = {name: torch.float16 if scale is None else scale.spec.torch_dtype for name, scale in stored.items()}
    config = source.config["quantization_config"]
    try:
        if sparse.wrote(config):
            return format_for(None), sparse.read_config(config)
        if config.get("format") == int_quantized.NAME:
            static = (t.spec.torch_dtype for n, t in source.tensors.items() if n.endswith(".input_scale"))
            return int_quantized.read_config(config, layers, scales, next(static, torch.float16))
        return format_for(None), packed.read_config(config, layers, scales)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{source.path} is quantized in a way that lmpress does not read ({error})",
            "load it with the tool that made it, or start from the original model",
        ) from error


def _read_layer(
    model: PreTrainedModel, name: str, args: WeightArgs, source: Source, stored_as: Format
) -> CompressedTensor | PrunedTensor:
    """The packed weight of layer `name`, once all its tensors are there and have the shapes that the model asks for."""
    linear = find_linears(model).get(name)
    if linear is None:
        raise CompressError(f"{source.path} packs {name}, which is no linear layer of its config.json", UNRELATED)
    shape = weight_of(linear).shape
    specs = stored_as.spec(name, args, *shape)
    for tensor, expected in specs.items():
        if tensor not in source.tensors:
            raise CompressError(f"{source.path} holds no tensor for {tensor}", "the checkpoint is incomplete")
        found = source.tensors[tensor].spec
        if found != expected:
            raise CompressError(f"{tensor} is {found}, and {expected} by its config.json", UNRELATED)
    weight = stored_as.unpack(name, {tensor: source.read(tensor, check=True) for tensor in specs}, args)
    if weight.shape != shape:
        raise CompressError(f"{name}.weight_shape is {weight.shape}, and {tuple(shape)} by its config.json", UNRELATED)
    return weight

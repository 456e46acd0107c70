"""A model without weights: its structure on the meta device, filled from the checkpoint one block at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...errors import CompressError, UsageError
from .config import config_of, refusals_named
from .moe import split_fused_experts, stored_names
from .source import Source

INCOMPLETE = "the checkpoint is incomplete"


def build(source: Source, dtype: torch.dtype = torch.float32, *, split_experts: bool = True) -> PreTrainedModel:
    """The causal language model that `source` describes, in eval mode; parameters on the meta device, buffers real.

    Fused experts are split into linear layers (see moe.py) unless `split_experts` is false.

    Raises `UsageError` as `config_of` does; code from the checkpoint is never run.
    """
    config = config_of(source)
    with refusals_named(source), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if split_experts:
        split_fused_experts(model)
    return model.eval()


def device_of(name: str) -> torch.device:
    """The torch device `name`. Raises `UsageError` if the name is unknown or this machine has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is unknown", "use cpu, cuda or cuda:0") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    available = accelerator is not None and accelerator.type == device.type
    if device.type != "cpu" and not (available and (device.index or 0) < torch.accelerator.device_count()):
        raise UsageError(f"this machine has no device {name!r}", "use cpu, or install the torch build of the device")
    return device


class Names:
    """The checkpoint's tensor names for a model's parameters.

    A parameter's tensor has the same name, the name with or without the base model's prefix, or a name that transformers
    would rename to it.
    """

    def __init__(self, model: PreTrainedModel, source: Source) -> None:
        self._source = source
        self._prefix = f"{model.base_model_prefix}."
        self._renamed = stored_names(model, source.tensors)
        self._tied: dict[str, str] = {}
        if model.config.tie_word_embeddings:
            self._tied = {str(k): str(v) for k, v in dict(getattr(model, "_tied_weights_keys", None) or {}).items()}

    def find(self, name: str) -> str | None:
        """The checkpoint's name of the parameter or buffer `name`; None if the checkpoint does not have it."""
        candidates = [self._renamed.get(name, name), name, name.removeprefix(self._prefix), self._prefix + name]
        if name in self._tied:
            candidates.append(self._tied[name])
            candidates.append(self._tied[name].removeprefix(self._prefix))
        return next((c for c in candidates if c in self._source.tensors), None)

    def ties(self, name: str) -> bool:
        """Whether parameter `name` is tied to another one, so that a checkpoint need not store it."""
        return name in self._tied


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer at the dotted `name` by `tensor`."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def materialise(
    module: nn.Module, prefix: str, source: Source, names: Names, device: torch.device | str, widen: bool = True
) -> None:
    """Read the parameters and stored buffers of `module`, whose dotted name is `prefix`, from the checkpoint.

    They get the dtype of the skeleton, or with `widen` false the one of the checkpoint. Raises `CompressError` with the
    parameter's name if the checkpoint does not have it, its shape differs, or it holds NaN or infinite values.
    """
    for name, placeholder in module.state_dict(keep_vars=True).items():
        full = f"{prefix}.{name}" if prefix else name
        stored = names.find(full)
        if stored is None:
            if isinstance(placeholder, nn.Parameter):
                raise CompressError(f"{source.path} holds no tensor for {full}", INCOMPLETE)
            continue
        assign(module, name, read(source, stored, placeholder, widen).to(device))
    for name, buffer in module.named_buffers():
        assign(module, name, buffer.to(device))


def check_tensors(source: Source, model: nn.Module, names: Names) -> None:
    """Compare the parameters of the skeleton `model` with the file headers; nothing is read.

    Raises `CompressError` with the parameter's name if its tensor is missing, has another shape, or holds integers.
    """
    for name, parameter in model.named_parameters():
        stored = names.find(name)
        if stored is None:
            raise CompressError(f"{source.path} holds no tensor for {name}", INCOMPLETE)
        _check_shape(source, stored, parameter)
        dtype = source.tensors[stored].spec.torch_dtype
        if not dtype.is_floating_point:
            raise CompressError(
                f"{stored} in {source.tensors[stored].file} holds {str(dtype).removeprefix('torch.')}, expected floats",
                "the checkpoint is damaged or quantized in a way that its config.json does not state",
            )


def _check_shape(source: Source, stored: str, like: Tensor) -> None:
    shape = source.tensors[stored].spec.shape
    if shape != tuple(like.shape):
        shapes = f"{shape} in the checkpoint, {tuple(like.shape)} by its config.json"
        raise CompressError(f"{stored} has shape {shapes}", "the checkpoint and its config do not match")


def read(source: Source, stored: str, like: Tensor, widen: bool = True) -> Tensor:
    """The checkpoint's tensor `stored`, in the dtype of `like` or, with `widen` false, its own.

    Raises `CompressError` if its shape is not the one of `like`, or if it holds NaN or infinite values.
    """
    _check_shape(source, stored, like)
    tensor = source.read(stored, check=True)
    return tensor.to(like.dtype) if widen else tensor


def release(module: nn.Module) -> None:
    """Move the module's parameters to the meta device, which frees their memory and keeps their shapes."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def outside(model: nn.Module, blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dotted names and modules of everything outside `blocks` that has parameters or buffers of its own."""
    inside = set(blocks.modules())
    for name, module in model.named_modules():
        if module not in inside and (module._parameters or module._buffers):
            yield name, module


def context_length(config: PretrainedConfig) -> int | None:
    """The maximum number of tokens that the model can read at once; None if its config sets no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None

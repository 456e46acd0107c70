"""A model without its weights: structure on the meta device, filled a block at a time from the checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PretrainedConfig, PreTrainedModel

from ...errors import CompressError, UsageError
from .moe import stored_names, split_fused_experts
from .source import Source


def build(source: Source, dtype: torch.dtype = torch.float32, *, split_experts: bool = True) -> PreTrainedModel:
    """The causal language model that `source` describes, parameters on the meta device, real buffers, eval mode.

    Fused experts become linear layers of their own (see experts.py), or stay as transformers has them: `split_experts` False.

    Raises `UsageError` where transformers has no such architecture; code from the checkpoint is never run.
    """
    config = config_of(source)
    try:
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise _no_model(source.path, error) from error
    if split_experts:
        split_fused_experts(model)
    return model.eval()


def config_of(source: Source) -> PreTrainedConfig:
    """The config as transformers knows it. Raises `UsageError` for one that it does not know."""
    try:
        if source.path.is_dir():
            config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(**source.config)
    except ValueError as error:
        raise _no_model(source.path, error) from error
    vars(config).pop("quantization_config", None)  # our packed modules replace transformers' own loading
    return config


def _no_model(path: Path, error: ValueError) -> UsageError:
    reason = str(error).strip().splitlines()[0]
    return UsageError(f"{path / 'config.json'} describes no language model that transformers can build: {reason}")


def device_of(name: str) -> torch.device:
    """The device called `name`. Raises `UsageError` where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is unknown", "use cpu, cuda or cuda:0") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = accelerator is not None and accelerator.type == device.type
    if device.type != "cpu" and not (there and (device.index or 0) < torch.accelerator.device_count()):
        raise UsageError(f"this machine has no device {name!r}", "use cpu, or install the torch build of the device")
    return device


class Names:
    """Which checkpoint tensor holds a parameter of the model: the same name, with or without the base model's prefix, or
    the one that transformers would rename to it."""

    def __init__(self, model: PreTrainedModel, source: Source) -> None:
        self._source = source
        self._prefix = f"{model.base_model_prefix}."
        self._renamed = stored_names(model, source.tensors)
        self._tied: dict[str, str] = {}
        if model.config.tie_word_embeddings:
            self._tied = {str(k): str(v) for k, v in dict(getattr(model, "_tied_weights_keys", None) or {}).items()}

    def find(self, name: str) -> str | None:
        """The checkpoint's name of the parameter or buffer `name`; None where the checkpoint has none."""
        candidates = [self._renamed.get(name, name), name, name.removeprefix(self._prefix), self._prefix + name]
        if name in self._tied:
            candidates.append(self._tied[name])
            candidates.append(self._tied[name].removeprefix(self._prefix))
        return next((c for c in candidates if c in self._source.tensors), None)

    def ties(self, name: str) -> bool:
        """Whether parameter `name` is only another name of a tied one, so that no checkpoint needs to store it."""
        return name in self._tied


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in place of the parameter or buffer at the dotted `name`."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def materialise(
    module: nn.Module, prefix: str, source: Source, names: Names, device: torch.device | str, widen: bool = True
) -> None:
    """Read the parameters and stored buffers of `module`, which stands at `prefix`, in the dtype of the skeleton (or, without
    `widen`, in their own).

    Raises `CompressError` naming a parameter that the checkpoint lacks or whose shape differs, or that holds NaN or Inf.
    """
    for name, placeholder in module.state_dict(keep_vars=True).items():
        full = f"{prefix}.{name}" if prefix else name
        stored = names.find(full)
        if stored is None:
            if isinstance(placeholder, nn.Parameter):
                raise CompressError(f"{source.path} holds no tensor for {full}", "the checkpoint is incomplete")
            continue
        assign(module, name, read(source, stored, placeholder, widen).to(device))
    for name, buffer in module.named_buffers():
        assign(module, name, buffer.to(device))


def read(source: Source, stored: str, like: Tensor, widen: bool = True) -> Tensor:
    """The checkpoint's tensor `stored`, checked to be finite and of the shape of `like`, in the dtype of `like` or its own."""
    tensor = source.read(stored, check=True)
    if tensor.shape != like.shape:
        shapes = f"{tuple(tensor.shape)} in the checkpoint, {tuple(like.shape)} by its config.json"
        raise CompressError(f"{stored} has shape {shapes}", "the checkpoint and its config do not belong together")
    return tensor.to(like.dtype) if widen else tensor


def release(module: nn.Module) -> None:
    """Give the memory of the module's parameters back; only their shapes stay."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def outside(model: nn.Module, blocks: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters or buffers of their own that are not part of `blocks`, with their dotted names."""
    inside = set(blocks.modules())
    for name, module in model.named_modules():
        if module not in inside and (module._parameters or module._buffers):
            yield name, module


def context_length(config: PretrainedConfig) -> int | None:
    """The most tokens that the model can read at once, None where its config sets no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None

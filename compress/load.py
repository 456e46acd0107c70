"""Load a model directory: packed checkpoints with the weights packed in memory, others as transformers does."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..calibrate.model.config import REFUSALS, config_of, reason_of
from ..calibrate.model.skeleton import Names, device_of, materialise, read
from ..calibrate.model.source import Source, read_object
from ..errors import CompressError, UsageError
from ..kernels.cache.cache import serve_cache
from ..kernels.cache.ranges import attach
from ..kernels.modules.dense import can_hold, hold
from ..kernels.modules.fused_decode import fuse_decode_layers
from ..kernels.modules.linear import Serving
from ..kernels.modules.replace import replace_linear
from ..recipes.scheme import CACHE_KEY, CacheScheme
from .formats.checkpoint import Checkpoint
from .formats.kv_cache import kv_scheme_from_config, stored_ranges
from .formats.source import open_source
from .output.record import RECORD
from .output.record import check as check_record
from .report.memory import give_back

GENERATION = "generation_config.json"
GIVE_BACK_EVERY = 8  # layers
FULL_BITS = 16  # the value of `kv_bits` for a cache that stays as it is


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    exact: bool = True,
    kernel: str | None = None,
    kv_bits: int | None = None,
    kv_window: int | None = None,
    check: bool = False,
) -> PreTrainedModel:
    """The causal language model at `path` (a directory, GGUF file or hub id), in eval mode, computing in `dtype` on `device`.

    Packed layers compute what their dequantized weights would; `exact` False lets their inputs become int8 codes, which is
    faster and off by a few thousandths: for generation, not for measurements. `kernel` forces one by name. `kv_bits` (2 to 8)
    packs the keys and values of all but the latest `kv_window` tokens while the model generates, the keys by calibrated ranges
    if the checkpoint has them; by default as in the checkpoint's recipe; 16: not at all.

    `check` first compares every weight file with its SHA-256 in lmpress.json.

    Raises `UsageError` for a path that is not a model directory or holds a format that lmpress does not read, and for a
    kernel that cannot serve here, `CompressError` if a tensor is missing, damaged or of another shape than in its config.
    """
    device_of(device)
    source = open_source(path)
    if check and not check_record(source.path):
        raise UsageError(f"{source.path} has no {RECORD} to check against", "load it without check=True")
    if "quantization_config" in source.config or source.path.is_file():
        model = _load_packed(source, device, Serving(exact, kernel, dtype))
    else:
        model = _load_dense(source, device, dtype)
    _serve_cache(model, source, kv_bits, kv_window)
    return model


def _serve_cache(model: PreTrainedModel, source: Source, bits: int | None, window: int | None) -> None:
    """Have the model pack its cache as asked, or as in the checkpoint, and record that in its config."""
    carried = getattr(model.config, CACHE_KEY, None)
    if carried is None and bits != FULL_BITS:
        elsewhere = kv_scheme_from_config(source.config.get("quantization_config", {}))
        if elsewhere is not None:
            setattr(model.config, CACHE_KEY, asdict(elsewhere))
    scheme = cache_scheme(model.config, bits, window)
    if scheme is not None:
        if scheme.static:
            attach(model, stored_ranges(source, model, scheme))
        serve_cache(model, scheme)
    packed = None if scheme is None else asdict(scheme)
    if packed != getattr(model.config, CACHE_KEY, None):
        setattr(model.config, CACHE_KEY, packed)


def cache_scheme(config: PreTrainedConfig, bits: int | None = None, window: int | None = None) -> CacheScheme | None:
    """How the cache of a model with this config is packed: as in the config, at `bits` and with a `window` if they are
    given; None: not at all.

    Raises `UsageError` for bits and windows that are not possible.
    """
    scheme = None if bits == FULL_BITS else CacheScheme.found_in(config)
    if bits not in (None, FULL_BITS):
        scheme = CacheScheme.of(bits) if scheme is None else scheme.at(bits)
    if window is None or scheme is None:
        if window is not None:
            raise UsageError("--kv-window needs a packed cache", "give --kv-bits 8 or 4 with --kv-window")
        return scheme
    return replace(scheme, window=window)


def _load_dense(source: Source, device: str, dtype: torch.dtype) -> PreTrainedModel:
    disable_progress_bar()
    config = config_of(source)
    _check_generation_config(source.path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (*REFUSALS, SafetensorError) as error:
        raise CompressError(f"{source.path} cannot be loaded: {reason_of(error)}", "download it again") from error
    model, info = loaded
    wrong = [*sorted(info["missing_keys"]), *(str(key) for key in info["mismatched_keys"])]
    if wrong:
        raise CompressError(
            f"{source.path} has missing or mismatched tensors: {', '.join(wrong[:3])}", "the checkpoint is incomplete"
        )
    return model.to(device).eval()


def _check_generation_config(path: Path) -> None:
    """Raise `CompressError` if there is a generation_config.json that transformers cannot read."""
    file = path / GENERATION
    if not file.is_file():
        return
    read_object(file)
    try:
        GenerationConfig.from_pretrained(path)
    except REFUSALS as error:
        raise CompressError(
            f"{file} cannot be used: {reason_of(error)}", "correct the value, or delete the file: it is optional"
        ) from error


def _hold_dense(checkpoint: Checkpoint, names: Names, device: torch.device, dtype: torch.dtype) -> bool:
    """Keep what is not quantized in the 16 bits that it is stored in, if kernels serve that; whether the head is tied."""
    tied: dict[str, list[str]] = {}
    for name, module in checkpoint.model.named_modules():
        stored = None if name in checkpoint.layers else names.find(f"{name}.weight")
        if stored is not None and can_hold(module, checkpoint.source.tensors[stored].spec.torch_dtype, device, dtype):
            tied.setdefault(stored, []).append(name)
    for stored, holders in tied.items():
        like = checkpoint.model.get_submodule(holders[0]).get_parameter("weight")
        hold(checkpoint.model, holders, read(checkpoint.source, stored, like, widen=False), dtype)
    return any(len(holders) > 1 for holders in tied.values())


def _load_packed(source: Source, device: str, serving: Serving) -> PreTrainedModel:
    checkpoint = Checkpoint.open(source, serving.dtype)
    model, source = checkpoint.model, checkpoint.source
    names, head = Names(model, source), checkpoint.tied_head
    tied = _hold_dense(checkpoint, names, device_of(device), serving.dtype)
    if head is not None:
        replace_linear(model, head, checkpoint.layer(checkpoint.embedding), serving, device)
    for index, name in enumerate(checkpoint.layers):
        replace_linear(model, name, checkpoint.layer(name), serving, device)
        if index % GIVE_BACK_EVERY == 0:
            give_back()
    materialise(model, "", source, names, device)
    if head is None and not tied:
        model.tie_weights()
    fuse_decode_layers(model)
    return model

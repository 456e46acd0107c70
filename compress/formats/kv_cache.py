"""Where a checkpoint keeps the calibrated ranges of its cache.

One scale of all keys of a layer and one of its values are stored as compressed-tensors has them, with any format of weights:

P.self_attn.k_scale, P.self_attn.v_scale   [1] in the scale's dtype: state = scale * (code - 2**(bits-1))
quantization_config.kv_cache_scheme        bits, and that they are symmetric, static and of the whole tensor

Other ranges lie in a file of their own, in safetensors' format under another suffix, since runtimes that take every
`*.safetensors` of a folder for weights would stumble over it: `layers.N.keys` and `layers.N.values`, `[channels, 2]`.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...calibrate.model import safetensors_io
from ...calibrate.model.architecture import find_blocks
from ...calibrate.model.safetensors_io import NAMES, TensorSpec
from ...calibrate.model.source import Source
from ...errors import CompressError, UsageError
from ...kernels.cache.ranges import KVRanges
from ...kernels.tensor.grid import parameters
from ...recipes.scheme import CacheScheme

CACHE_RANGES = "cache_ranges.lmpress"
SCALES = ("k_scale", "v_scale")
PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")  # by which compressed-tensors recognizes an attention layer
IN_FULL = "load it with kv_bits=16"


def attentions(model: PreTrainedModel) -> list[str]:
    """The dotted names of the attention layers, one per block, that compressed-tensors would give scales; none if it would
    not know those of some block."""
    prefix, blocks = find_blocks(model)
    found = []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            takes_cache = any(p.startswith("past_key_value") for p in inspect.signature(module.forward).parameters)
            projects = any(hasattr(module, each) for each in PROJECTIONS)
            if "attention" in type(module).__name__.lower() and projects and takes_cache:
                found.append(f"{prefix}.{index}.{name}")
    return found if len(found) == len(blocks) else []


def scale_specs(attention: Sequence[str], scheme: CacheScheme) -> dict[str, TensorSpec]:
    """What `scales` will give for the layers `attention`."""
    arguments = zip(SCALES, (scheme.keys, scheme.values), strict=True)
    dtypes = {part: NAMES[args.torch_scale_dtype] for part, args in arguments}
    return {f"{name}.{part}": TensorSpec(dtype, (1,)) for name in attention for part, dtype in dtypes.items()}


def scales(attention: str, ends: KVRanges, scheme: CacheScheme) -> dict[str, Tensor]:
    """The tensors of one attention layer under a scheme that `is_shared`."""
    found = {}
    for part, each, args in zip(SCALES, ends, (scheme.keys, scheme.values), strict=True):
        assert each is not None
        found[f"{attention}.{part}"] = parameters(each[:, 0], each[:, 1], args)[0].to(args.torch_scale_dtype)
    return found


def is_scale(name: str) -> bool:
    """Whether the stored tensor is a scale of the cache."""
    return name.rpartition(".")[2] in SCALES


def kv_cache_scheme(scheme: CacheScheme) -> dict[str, Any]:
    """A scheme that `is_shared` in compressed-tensors' words."""
    words = {"num_bits": scheme.keys.bits, "type": "int", "symmetric": True, "strategy": "tensor"}
    return words | {"group_size": None, "dynamic": False}


def kv_scheme_from_config(quantization: Mapping[str, Any]) -> CacheScheme | None:
    """The scheme that a `quantization_config` describes, None without one. Raises `UsageError` for other ones than ours."""
    found = quantization.get("kv_cache_scheme")
    if not found:
        return None
    kind = " ".join(str(found.get(key)) for key in ("num_bits", "type", "strategy"))
    shared = (found.get("type"), found.get("symmetric"), found.get("strategy"), bool(found.get("dynamic")))
    if shared != ("int", True, "tensor", False):
        raise UsageError(f"its cache is kept as {kind}, not in integers with one static, symmetric scale", IN_FULL)
    return CacheScheme.shared(found["num_bits"], scale_dtype="float32")  # holds what is stored in any dtype


def stored_ranges(source: Source, model: PreTrainedModel, scheme: CacheScheme) -> list[KVRanges]:
    """The calibrated ranges of all layers, in their order. Raises `CompressError` if they are not there or damaged."""
    if not any(map(is_scale, source.tensors)):
        return read_ranges(source.path / CACHE_RANGES)
    found = kv_scheme_from_config(source.config["quantization_config"]) or scheme
    largest = 2 ** (found.keys.bits - 1) - 1
    return [
        KVRanges(*(_around_zero(source, f"{name}.{part}", largest) for part in SCALES)) for name in attentions(model)
    ]


def _around_zero(source: Source, name: str, largest: int) -> Tensor:
    """The range `[1, 2]` that the stored scale `name` belongs to, in float64: it gives back that very scale."""
    if name not in source.tensors:
        raise CompressError(f"{source.path} holds no tensor for {name}", "the checkpoint is incomplete")
    scale = source.read(name, check=True).double()
    if scale.numel() != 1 or not bool(scale > 0):
        raise CompressError(f"{name} is {scale.tolist()}, not one positive number", "fetch the checkpoint again")
    return torch.stack([-scale, scale]).reshape(1, 2) * largest


def write_ranges(file: Path, ranges: Sequence[KVRanges]) -> None:
    """Store the ranges of layers in their order."""
    tensors = {
        f"layers.{index}.{role}": ends.cpu().contiguous()
        for index, layer in enumerate(ranges)
        for role, ends in layer._asdict().items()
        if ends is not None
    }
    safetensors_io.write(file, tensors)


def read_ranges(file: Path) -> list[KVRanges]:
    """The ranges of all layers, in their order. Raises `CompressError` if they are not there or not whole."""
    remedy = f"fetch the checkpoint again, or {IN_FULL}"
    if not file.is_file():
        raise CompressError(f"{file} is missing: the checkpoint's cache has calibrated ranges", remedy)
    stored = safetensors_io.read(file)
    count = len({name.rpartition(".")[0] for name in stored})
    roles = [role for role in KVRanges._fields if f"layers.0.{role}" in stored]
    names = {f"layers.{index}.{role}" for index in range(count) for role in roles}
    if names != set(stored) or any(ends.ndim != 2 or ends.shape[1] != 2 for ends in stored.values()):
        raise CompressError(f"{file} does not hold the ranges of layers 0 to {count - 1}", remedy)
    return [KVRanges(*(stored.get(f"layers.{index}.{role}") for role in KVRanges._fields)) for index in range(count)]

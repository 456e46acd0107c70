"""A checkpoint with quantized layers, ours or others': which layers, how each is quantized, and its tensor when asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...calibrate.model.architecture import find_blocks, weight_of
from ...calibrate.model.moe import model_names, routers
from ...calibrate.model.safetensors_io import TensorSpec
from ...calibrate.model.skeleton import Names, build
from ...calibrate.model.source import Source
from ...errors import CompressError, UsageError
from ...kernels.tensor import Compressed, LowRankTensor
from ...recipes.scheme import QuantArgs, WeightArgs
from . import int_quantized, llm_int8
from .export import awq, bitsandbytes, gptq
from .kv_cache import is_scale
from .registry import LOW_RANK, format_that_wrote, low_rank_spec
from .source import open_source

UNRELATED = "the checkpoint and its config do not belong together"


@dataclass(frozen=True)
class Reader:
    """How one format is read; `optional` tensors of a layer may be absent. `inputs` says how layers' inputs are quantized.

    arguments  of every layer that a `quantization_config` and the specs of the stored tensors speak of
    specs      of a layer's tensors, from its name, arguments, rows and columns
    """

    arguments: Callable[[Mapping[str, Any], Mapping[str, TensorSpec]], Mapping[str, WeightArgs]]
    specs: Callable[[str, Any, int, int], dict[str, TensorSpec]]
    unpack: Callable[[str, Mapping[str, Tensor], Any], Compressed]
    optional: tuple[str, ...] = ()
    inputs: QuantArgs | None = None


def _reader(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> Reader:
    """The reader of a checkpoint with this `quantization_config` and these tensors. Raises `ValueError` without one."""
    if config.get("format") == LOW_RANK:
        return _with_low_rank(_reader(config["base"], stored))
    if config.get("quant_method") == "gptq":
        unpack = partial(gptq.unpack, offset=gptq.offset_of(config))
        return Reader(gptq.read_config, gptq.spec, unpack, optional=("g_idx",))
    if config.get("quant_method") == "awq":
        return Reader(awq.read_config, awq.spec, awq.unpack)
    if bitsandbytes.wrote(config):
        specs = bitsandbytes.as_stored(stored)
        return Reader(bitsandbytes.read_config, specs, bitsandbytes.unpack, optional=("weight_format",))
    ours = format_that_wrote(config)
    if ours not in (int_quantized, llm_int8):
        return Reader(ours.read_config, ours.spec, ours.unpack)
    layers = ours.of_config(config, stored)
    return Reader(ours.read_config, layers.spec, layers.unpack, inputs=layers.inputs)


def _with_low_rank(base: Reader) -> Reader:
    """The reader of a checkpoint whose layers have a low-rank term beside what `base` reads."""

    def arguments(config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> dict[str, WeightArgs]:
        ranks = {name: group["rank"] for group in config["config_groups"] for name in group["targets"]}
        return {name: replace(args, rank=ranks[name]) for name, args in base.arguments(config["base"], stored).items()}

    def specs(name: str, args: QuantArgs, rows: int, columns: int) -> dict[str, TensorSpec]:
        return base.specs(name, replace(args, rank=0), rows, columns) | low_rank_spec(name, args, rows, columns)

    def unpack(name: str, tensors: Mapping[str, Tensor], args: QuantArgs) -> LowRankTensor:
        quantized: Any = base.unpack(name, tensors, replace(args, rank=0))
        return LowRankTensor(quantized, tensors[f"{name}.weight_left"], tensors[f"{name}.weight_right"])

    return Reader(arguments, specs, unpack, base.optional, base.inputs)


@dataclass(frozen=True)
class Checkpoint:
    """`source` with its skeleton `model`; `layers` holds the arguments of the quantized layers in the model's order."""

    source: Source
    model: PreTrainedModel
    layers: dict[str, WeightArgs]
    reader: Reader | None

    @classmethod
    def open(cls, path: str | Path | Source, dtype: torch.dtype = torch.float32) -> "Checkpoint":
        """The checkpoint at `path`; a dense model has no `layers`. Loads nothing.

        Raises `UsageError` for a format that lmpress does not read, `CompressError` for layers that the model lacks.
        """
        source = path if isinstance(path, Source) else open_source(path)
        model = build(source, dtype)
        if "quantization_config" not in source.config:
            return cls(source, model, {}, None)
        try:
            config = source.config["quantization_config"]
            stored = {name: tensor.spec for name, tensor in source.tensors.items()}
            reader = _reader(config, stored)
            found = reader.arguments(config, stored)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{source.path} is quantized in a way that lmpress does not read ({error})",
                "load it with the tool that made it, or start from the original model",
            ) from error
        linears = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        ]
        own = model_names(model, source.tensors)
        modules = {stored.rpartition(".")[0]: name.rpartition(".")[0] for stored, name in own.items()}
        found = {modules.get(name, name): args for name, args in found.items()}
        source = replace(source, tensors={own.get(name, name): tensor for name, tensor in source.tensors.items()})
        foreign = next(iter(found.keys() - set(linears)), None)
        if foreign is not None:
            raise CompressError(f"{source.path} packs {foreign}, which is no layer of its config.json", UNRELATED)
        return cls(source, model, {name: found[name] for name in linears if name in found}, reader)

    def layer(self, name: str) -> Compressed:
        """The compressed layer `name`, once all its tensors are there and have the shapes that the model asks for.

        Raises `CompressError` where they are absent, damaged or of another shape.
        """
        assert self.reader is not None
        shape, args = self.shape(name), self.layers[name]
        specs = self.reader.specs(name, args, *shape)
        for part in [part for part in specs if part not in self.source.tensors]:
            if part.rpartition(".")[2] not in self.reader.optional:
                raise CompressError(f"{self.source.path} holds no tensor for {part}", "the checkpoint is incomplete")
            del specs[part]
        for part, expected in specs.items():
            found = self.source.tensors[part].spec
            if found != expected:
                raise CompressError(f"{part} is {found}, and {expected} by its config.json", UNRELATED)
        tensor = self.reader.unpack(name, {part: self.source.read(part, check=True) for part in specs}, args)
        if tensor.shape != shape:
            raise CompressError(f"{name}.weight_shape is {tensor.shape}, and {shape} by its config.json", UNRELATED)
        return tensor

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear layer."""
        rows, columns = weight_of(self.model.get_submodule(name)).shape
        return rows, columns

    def _name(self, wanted: nn.Module | None) -> str:
        return next(name for name, module in self.model.named_modules() if module is wanted)

    def is_conv1d(self, name: str) -> bool:
        """Whether the layer is transformers' `Conv1D`, which stores its weight as `[in, out]`."""
        return isinstance(self.model.get_submodule(name), Conv1D)

    @property
    def tied_head(self) -> str | None:
        """The linear layer that computes with the packed embedding; None where the embedding is dense or stands alone."""
        tied = self.model.config.tie_word_embeddings and self.embedding in self.layers
        return self._name(self.model.get_output_embeddings()) if tied else None

    @property
    def embedding(self) -> str:
        """The table that tokens are looked up in."""
        return self._name(self.model.get_input_embeddings())

    def is_embedding(self, name: str) -> bool:
        """Whether the layer is a table that rows are looked up in."""
        return isinstance(self.model.get_submodule(name), nn.Embedding)

    @property
    def dense(self) -> list[str]:
        """The linear layers that are not quantized, the head and routers among them."""
        modules = {n: m for n, m in self.model.named_modules() if n not in self.layers}
        spared = routers(self.model)
        return [n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D) or m in spared]

    @property
    def others(self) -> dict[str, str]:
        """The tensors that are no part of a quantized layer or of the cache: the model's name of each -> the checkpoint's name.

        Where embeddings are tied, the head's second copy is left out.
        """
        names = Names(self.model, self.source)
        parts = {
            part
            for name, args in self.layers.items()
            if self.reader is not None
            for part in self.reader.specs(name, args, *self.shape(name))
        }
        known = {names.find(name): name for name in self.model.state_dict(keep_vars=True) if not names.ties(name)}
        return {
            known.get(stored, stored): stored
            for stored in self.source.tensors
            if stored not in parts and not is_scale(stored) and not (stored not in known and names.ties(stored))
        }

    @property
    def cache_scales(self) -> list[str]:
        """The tensors that are scales of a packed cache."""
        return [stored for stored in self.source.tensors if is_scale(stored)]

    @property
    def blocks(self) -> tuple[str, int]:
        """The dotted name of the list of decoder blocks, and their number."""
        name, blocks = find_blocks(self.model)
        return name, len(blocks)

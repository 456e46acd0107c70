"""A checkpoint with quantized layers, ours or others': which layers, how each is quantized, and its tensor when asked for."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...calibrate.model.architecture import find_blocks, weight_of
from ...calibrate.model.moe import model_names, routers
from ...calibrate.model.skeleton import Names, build
from ...calibrate.model.source import Source
from ...errors import CompressError, UsageError
from ...kernels.tensor import Compressed
from ...recipes.scheme import WeightArgs
from .kv_cache import is_scale
from .registry import Reader, reader_of
from .source import open_source

UNRELATED = "the checkpoint and its config do not belong together"


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

        Raises `UsageError` for a format that lmpress does not read, `CompressError` for layers that the model does not have.
        """
        source = path if isinstance(path, Source) else open_source(path)
        model = build(source, dtype)
        if "quantization_config" not in source.config:
            return cls(source, model, {}, None)
        reader, found = read_layers(source)
        linears = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        ]
        own = model_names(model, source.tensors)
        modules = {stored.rpartition(".")[0]: name.rpartition(".")[0] for stored, name in own.items()}
        found = {modules.get(name, name): args for name, args in found.items()}
        source = replace(source, tensors={own.get(name, name): tensor for name, tensor in source.tensors.items()})
        foreign = next(iter(found.keys() - set(linears)), None)
        if foreign is not None:
            raise CompressError(f"{source.path} packs {foreign}, which is not a layer of its config.json", UNRELATED)
        return cls(source, model, {name: found[name] for name in linears if name in found}, reader)

    def layer(self, name: str) -> Compressed:
        """The compressed layer `name`, once all its tensors are there and have the shapes that the model asks for.

        Raises `CompressError` if they are absent, damaged or of another shape.
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
        tensors = {part: self.source.read(part, check=True) for part in specs}
        stated = tensors.get(f"{name}.weight_shape")
        if stated is not None and tuple(stated.tolist()) != shape:  # before anything of that size is allocated
            raise CompressError(
                f"{name}.weight_shape is {tuple(stated.tolist())}, and {shape} by its config.json", UNRELATED
            )
        tensor = self.reader.unpack(name, tensors, args)
        if tensor.shape != shape:
            raise CompressError(f"{name} is {tensor.shape} as it is stored, and {shape} by its config.json", UNRELATED)
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
        """The linear layer that computes with the packed embedding; None if the embedding is dense or stands alone."""
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
        """The tensors that belong to no quantized layer or of the cache: the model's name of each -> the checkpoint's name.

        If embeddings are tied, the head's second copy is left out.
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


def read_layers(source: Source) -> tuple[Reader, dict[str, WeightArgs]]:
    """The reader of a quantized checkpoint, and the arguments of its layers by the checkpoint's own names.

    Raises `UsageError` for a format that lmpress does not read.
    """
    try:
        config = source.config["quantization_config"]
        if not isinstance(config.get("quant_method"), str):
            raise ValueError("its quantization_config has no quant_method")
        stored = {name: tensor.spec for name, tensor in source.tensors.items()}
        reader = reader_of(config, stored)
        return reader, dict(reader.arguments(config, stored))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{source.path} is quantized in a way that lmpress does not read ({error})",
            "load it with the tool that made it, or start from the original model",
        ) from error

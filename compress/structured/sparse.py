"""Students with packed zeros: unfolded for training, and stored again with the same weights present."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...calibrate.model.architecture import find_linears, weight_of
from ...calibrate.model.source import Source
from ...errors import UsageError
from ..export import export
from ..formats.checkpoint import Checkpoint
from ..formats.kinds import pruned
from ..formats.source import open_source
from .drop_layers import write_model


def is_sparse(source: Source) -> bool:
    """Whether the checkpoint's zeros are packed. Raises `UsageError` for quantized ones: codes cannot be trained so."""
    quantization = source.config.get("quantization_config")
    if quantization is None or pruned.wrote(quantization):
        return quantization is not None
    raise UsageError(
        f"{source.path} is quantized: what is trained would have to be quantized again",
        "train the model that it was made from and quantize behind it (recipe smaller-w4); the passes tune and lkd train codes",
    )


def unfold(source: Source, folder: Path) -> Source:
    """The checkpoint with every zero written out, in `folder`, or the one that is there already."""
    if not folder.exists():
        export(source.path, folder, format="fp32")
    return open_source(folder)


def refold(folder: Path, source: Source, student: PreTrainedModel) -> None:
    """Write the weights of `student` in the layout of `source`: what it does not store is zero, and nothing else moves."""
    checkpoint = Checkpoint.open(source)
    parameters, linears = dict(student.named_parameters()), find_linears(student)
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.layers:
        tensors |= pruned.pack_again(name, checkpoint.layer(name), weight_of(linears[name]).detach().cpu())
    for name, stored in checkpoint.others.items():
        if name in parameters:
            tensors[stored] = parameters[name].detach().cpu().to(source.tensors[stored].spec.torch_dtype)
    specs = {name: tensor.spec for name, tensor in source.tensors.items()}

    def read(name: str) -> torch.Tensor:
        return tensors[name] if name in tensors else source.read(name)

    write_model(folder, source, source.config, specs, read)

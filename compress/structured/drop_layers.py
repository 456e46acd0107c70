"""Depth pruning: a model of some layers of another one, whose tensors are copied as they are stored."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...calibrate.model.architecture import find_blocks
from ...calibrate.model.config import config_of
from ...calibrate.model.safetensors_io import StoredTensor, TensorSpec, storage_errors, streamed, write_text
from ...calibrate.model.skeleton import Names, build
from ...calibrate.model.source import CONFIG, Source
from ...errors import UsageError
from ..formats.source import open_source
from ..output.target import appearing, check_target
from .config import check_same_blocks, config_of_layers


def keep_layers(model: str | Path, out: Path, kept: Sequence[int], overwrite: bool = False) -> None:
    """Write the model of the layers `kept` (rising numbers, from 0) of `model` into the directory `out`.

    Its layer `i` is layer `kept[i]` of `model` bit for bit; everything outside the layers is copied. Raises `UsageError` for
    layers that do not exist and for a selection that the config cannot express.
    """
    source = open_source(model)
    teacher = build(source)
    check_layers(kept, len(find_blocks(teacher)[1]))
    check_target(out, overwrite, source.path)
    config = config_of_layers(source.config, config_of(source), kept)
    tensors = _renumbered(source, teacher, kept)
    with appearing(out) as folder:
        specs = {name: tensor.spec for name, tensor in tensors.items()}
        write_model(folder, source, config, specs, lambda name: tensors[name].read())
        student = build(open_source(folder))
        check_same_blocks(teacher, student, kept)
        check_complete(student, open_source(folder))


def check_layers(kept: Sequence[int], count: int) -> None:
    """Raise `UsageError` if `kept` is empty or not a list of rising layer numbers of a model with `count` layers."""
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise UsageError(
            f"layers {','.join(map(str, kept)) or 'none'} cannot be kept",
            f"give rising numbers between 0 and {count - 1}, such as 0,2,4",
        )


def write_model(
    folder: Path,
    source: Source,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
) -> None:
    """Write a dense checkpoint of the tensors that `read` gives, with the files that accompany the weights of `source`."""
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    with storage_errors(folder):
        source.copy_companions(folder)
    with streamed(folder, specs) as put:
        for name in specs:
            put(name, read(name))


def check_complete(student: PreTrainedModel, source: Source) -> None:
    """Raise `UsageError` if a parameter of the `student` has no tensor in its checkpoint `source`."""
    names = Names(student, source)
    missing = [name for name, _ in student.named_parameters() if names.find(name) is None]
    if missing:
        raise UsageError(f"the reduced model would lack {missing[0]}", "its layers cannot be removed")


def _renumbered(source: Source, teacher: PreTrainedModel, kept: Sequence[int]) -> dict[str, StoredTensor]:
    """The stored tensors of the reduced model, by their names in it."""
    prefix = _stored_prefix(source, teacher)
    places = {old: new for new, old in enumerate(kept)}
    tensors = {}
    for name, tensor in source.tensors.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not number.isdigit():
            tensors[name] = tensor
        elif int(number) in places:
            tensors[f"{prefix}{places[int(number)]}.{rest}"] = tensor
    return tensors


def _stored_prefix(source: Source, teacher: PreTrainedModel) -> str:
    """The prefix of a block's number in the names of the checkpoint's tensors, such as `model.layers.`."""
    prefix, blocks = find_blocks(teacher)
    names = Names(teacher, source)
    for local, _ in blocks[0].named_parameters():
        stored = names.find(f"{prefix}.0.{local}")
        if stored is not None and ".0." in stored:
            return stored[: stored.index(".0.") + 1]
    raise UsageError(f"{source.path} holds no tensor of the first layer", "the checkpoint is incomplete")

"""Storage that needs little memory: activations between two blocks, and copies of a block's original weights."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .model.architecture import find_linears
from .model.safetensors_io import storage_errors

IN_MEMORY_BYTES = 256 * 2**20


class ActivationStore:
    """Hidden states by batch number. Tensors beyond `in_memory_bytes` are stored in files in the folder `scratch`.

    A file is read and written as a whole, not mapped: mapped pages would count as memory of the process.
    """

    def __init__(self, scratch: Path, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self._scratch = scratch
        self._budget = in_memory_bytes
        self._in_memory: dict[int, Tensor] = {}
        self._files: dict[int, tuple[Path, torch.Size, torch.dtype]] = {}

    def __len__(self) -> int:
        return len(self._in_memory) + len(self._files)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        tensor = tensor.detach().to("cpu").contiguous()
        others = sum(t.nbytes for i, t in self._in_memory.items() if i != index)
        if index not in self._files and others + tensor.nbytes <= self._budget:
            self._in_memory[index] = tensor
            return
        self._scratch.mkdir(exist_ok=True)
        path = self._scratch / f"activations-{index:05d}.bin"
        with storage_errors(path), path.open("wb") as file:
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
        self._files[index] = (path, tensor.shape, tensor.dtype)

    def __getitem__(self, index: int) -> Tensor:
        if index in self._in_memory:
            return self._in_memory[index]
        path, shape, dtype = self._files[index]
        buffer = torch.empty(shape, dtype=dtype)
        with path.open("rb") as file:
            file.readinto(buffer.flatten().view(torch.uint8).numpy().data)
        return buffer


def snapshot(block: nn.Module) -> nn.Module:
    """A copy of `block` that computes the same as `block` now, whatever happens to `block` later.

    Parameters of linears that a 16-bit dtype holds exactly are stored in it, and converted back while the linear is called.
    Almost every checkpoint stores 16-bit numbers, so the copy usually takes half the memory of the block.
    """
    narrowed: dict[int, Any] = {}
    for linear in find_linears(block).values():
        for parameter in linear.parameters(recurse=False):
            narrow = _narrowest(parameter.detach())
            if narrow.dtype != parameter.dtype:
                narrowed[id(parameter)] = nn.Parameter(narrow, requires_grad=False)
    copy = deepcopy(block, memo=dict(narrowed))  # deepcopy uses the objects of its memo as copies
    for name, linear in find_linears(copy).items():
        if any(id(p) in narrowed for p in block.get_submodule(name).parameters(recurse=False)):
            _widen_when_called(linear, block.get_submodule(name))
    return copy


def _narrowest(values: Tensor) -> Tensor:
    """`values` in the first 16-bit dtype that holds them exactly, or as they are."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = values.to(dtype)
        if torch.equal(narrow.to(values.dtype), values):
            return narrow
    return values


def _widen_when_called(linear: nn.Module, like: nn.Module) -> None:
    stored = dict(linear._parameters)
    wide = {name: None if p is None else p.dtype for name, p in like._parameters.items()}

    def widen(module: nn.Module, args: object) -> None:
        for name, parameter in stored.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to(wide[name]), requires_grad=False)

    def narrow(module: nn.Module, args: object, output: object) -> None:
        module._parameters.update(stored)

    linear.register_forward_pre_hook(widen)
    linear.register_forward_hook(narrow, always_call=True)

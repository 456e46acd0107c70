"""Activations between two blocks: kept in memory while they are few, in a file when they are many."""

from pathlib import Path

import torch
from torch import Tensor

from ..compress.formats.shards import storage_errors

IN_MEMORY_BYTES = 256 * 2**20


class ActivationStore:
    """Hidden states per batch, replaced in place as the walk goes on. More samples cost disk, not memory.

    Reads and writes go through a plain file rather than a memory map: mapped pages would count as the process's memory.
    """

    def __init__(self, scratch: Path, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self._scratch = scratch
        self._budget = in_memory_bytes
        self._held: dict[int, Tensor] = {}
        self._files: dict[int, tuple[Path, torch.Size, torch.dtype]] = {}

    def __len__(self) -> int:
        return len(self._held) + len(self._files)

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        tensor = tensor.detach().to("cpu").contiguous()
        others = sum(t.nbytes for i, t in self._held.items() if i != index)
        if index not in self._files and others + tensor.nbytes <= self._budget:
            self._held[index] = tensor
            return
        self._scratch.mkdir(exist_ok=True)
        path = self._scratch / f"activations-{index:05d}.bin"
        with storage_errors(path), path.open("wb") as file:
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
        self._files[index] = (path, tensor.shape, tensor.dtype)

    def __getitem__(self, index: int) -> Tensor:
        if index in self._held:
            return self._held[index]
        path, shape, dtype = self._files[index]
        buffer = torch.empty(shape, dtype=dtype)
        with path.open("rb") as file:
            file.readinto(buffer.flatten().view(torch.uint8).numpy().data)
        return buffer

"""The module of a packed table: only the rows that are looked up are unpacked."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..packing.bitstream import pack_rows, unpack_rows
from ..tensor import CompressedTensor


class PackedEmbedding(nn.Module):
    """Rows of a quantized table `[rows, width]`, kept in memory as packed codes.

    words        int32 `[rows, ceil(width * bits / 32)]`
    scale, zero  as the tensor stores them; `zero` is None if the grid is symmetric
    """

    def __init__(self, tensor: CompressedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = tensor.shape
        self.args, self.dtype = tensor.args, dtype
        self.words: Tensor
        self.scale: Tensor
        self.zero: Tensor | None
        self.register_buffer("words", pack_rows(tensor.codes, tensor.args.bits), persistent=False)
        self.register_buffer("scale", tensor.scale, persistent=False)
        self.register_buffer("zero", tensor.zero, persistent=False)

    @property
    def compressed(self) -> CompressedTensor:
        """What the module serves."""
        return self._rows(torch.arange(self.num_embeddings, device=self.words.device))

    def forward(self, ids: Tensor) -> Tensor:
        return self._rows(ids.flatten()).dequantize(self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int{self.args.bits}, group_size={self.args.group_size}"

    def _rows(self, ids: Tensor) -> CompressedTensor:
        codes = unpack_rows(self.words[ids], self.args.bits, self.embedding_dim)
        return CompressedTensor(codes, self.scale[ids], None if self.zero is None else self.zero[ids], self.args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        """Moves and casts change the device and the dtype of the output; what is stored keeps its dtype."""
        stored = dict(self.named_buffers())
        place = fn(torch.empty(0, dtype=self.dtype, device=self.words.device))
        super()._apply(fn, recurse)
        for name, part in stored.items():
            self._buffers[name] = part.to(place.device)
        self.dtype = place.dtype
        return self

"""llama.cpp as a runtime of `verify`, by its library in the package llama-cpp-python.

It quantizes the inputs of every product to 8 bits (Q8_0, Q8_K), so its logits are near the reference's and never equal. Its
weights are what its own functions make of the blocks in the file, and equal bit for bit where a format is lossless. It shows no
hidden states.
"""

import ctypes
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.source import Source, gguf_file, open_source
from ..compress.errors import CompressError, UsageError
from ..compress.formats.checkpoint import Checkpoint


def library() -> Any:
    """The package llama_cpp. Raises `UsageError` where it is not installed."""
    try:
        return import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise UsageError("llama.cpp needs the package llama-cpp-python", "pip install llama-cpp-python") from error


def llamacpp_outputs(
    checkpoint: Path, ids: Tensor, layers: list[str], write: Callable[[str, Tensor], None]
) -> dict[str, Tensor]:
    """The logits of `ids` `[rows, length]`; `write` is given the weight of each of the `layers`."""
    opened, weights = Checkpoint.open(checkpoint), Weights(checkpoint)
    for name in layers:
        write(name, weights.read(name, opened.shape(name)))
    return {"logits": logits(checkpoint, ids)}


def logits(checkpoint: Path, ids: Tensor) -> Tensor:
    """Of the tokens `ids` `[rows, length]`, float32 `[rows, length, vocabulary]`, with a cache in float32."""
    llama_cpp, file = library(), gguf_file(checkpoint)
    if file is None:
        raise CompressError(f"{checkpoint} holds no GGUF file", "export it with --format gguf")
    options = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "verbose": False}
    model = llama_cpp.Llama(str(file), n_ctx=ids.shape[1], n_batch=ids.shape[1], logits_all=True, **options)
    rows = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        rows.append(torch.from_numpy(model.scores[: len(row)].copy()))
    return torch.stack(rows)


class Weights:
    """The weights of `checkpoint` by llama.cpp's own functions, rows in transformers' order."""

    def __init__(self, checkpoint: Path) -> None:
        self._source: Source = open_source(checkpoint)
        folder = Path(library().__file__).parent / "lib"
        self._ggml = ctypes.CDLL(str(next(folder.glob("*ggml-base.*"))))
        groups = self._source.config.get("quantization_config", {"config_groups": []})["config_groups"]
        self._blocks = {name: group["block"] for group in groups for name in group["targets"]}

    def read(self, layer: str, shape: tuple[int, int]) -> Tensor:
        """Of a layer `(out, in)`, float32."""
        if layer not in self._blocks:
            return self._source.read(f"{layer}.weight").float()
        packed, block = self._source.read(f"{layer}.weight_blocks"), self._blocks[layer]
        values = torch.empty(shape)
        dequantize = self._ggml[f"dequantize_row_{block.lower().replace('_k', '_K')}"]
        dequantize.argtypes, dequantize.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
        dequantize(packed.data_ptr(), values.data_ptr(), values.numel())
        return values

"""llama.cpp as a runtime of `verify`, by its library in the package llama-cpp-python.

llama.cpp quantizes the inputs of every product to 8 bits (Q8_0, Q8_K), so its logits are close to the reference's but not
equal. Its weights are read by its own dequantization functions, and equal ours bit for bit if the format is lossless. Its
evaluation callback gives the hidden states after every block.
"""

import ctypes
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ...calibrate.model.source import Source, gguf_file
from ...compress.formats.checkpoint import Checkpoint
from ...compress.formats.source import open_source
from ...errors import CompressError, UsageError

BLOCK_OUTPUT = "l_out-"  # name of the hidden states after a block in llama.cpp's graphs, without the block number


def library() -> Any:
    """The package llama_cpp. Raises `UsageError` if it is not installed."""
    try:
        return import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise UsageError("llama.cpp needs the package llama-cpp-python", "pip install llama-cpp-python") from error


def llamacpp_outputs(
    checkpoint: Path, ids: Tensor, layers: list[str], write: Callable[[str, Tensor], None]
) -> dict[str, Tensor]:
    """`logits` and `hidden.N` (the states after block N) of `ids` int64 `[rows, length]`; `write` is called with the name and
    weight of each of the `layers`."""
    opened, weights = Checkpoint.open(checkpoint), Weights(checkpoint)
    for name in layers:
        write(name, weights.read(name, opened.shape(name)))
    with Session(checkpoint, ids.shape[1]) as session:
        rows = [session.run(row) for row in ids.tolist()]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Session:
    """A context of llama.cpp over the file at `checkpoint` for rows of `length` tokens, with a cache in float32."""

    def __init__(self, checkpoint: Path, length: int) -> None:
        self._api, self._ggml, file = library(), tensors_library(), gguf_file(checkpoint)
        if file is None:
            raise CompressError(f"{checkpoint} holds no GGUF file", "export it with --format gguf")
        self._length, self._seen = length, dict[str, Tensor]()
        self._callback = self._api.ggml_backend_sched_eval_callback(self._collect)  # must outlive the context
        self._silence = self._api.llama_log_callback(lambda level, text, data: None)
        self._api.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._model = self._api.llama_model_load_from_file(str(file).encode(), self._api.llama_model_default_params())
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length
        parameters.type_k = parameters.type_v = self._api.GGML_TYPE_F32
        parameters.cb_eval, parameters.no_perf = self._callback, True
        self._context = self._api.llama_init_from_model(self._model, parameters) if self._model else None
        if not self._context:
            raise CompressError(f"llama.cpp does not load {file}", "llama-cli -m FILE prints the reason")

    def run(self, ids: list[int]) -> dict[str, Tensor]:
        """`logits` `[length, vocabulary]` and `hidden.N` `[length, width]` of one row of tokens, float32."""
        self._seen.clear()
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        batch = self._api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, True
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        failed = self._api.llama_decode(self._context, batch)
        self._api.llama_batch_free(batch)
        if failed:
            raise CompressError(f"llama.cpp failed on {len(ids)} tokens (llama_decode returned {failed})")
        size = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        found = torch.empty(len(ids), size)
        ctypes.memmove(found.data_ptr(), self._api.llama_get_logits(self._context), found.nbytes)
        return {"logits": found, **self._seen}

    def _collect(self, tensor: int, before: bool, data: object) -> bool:
        """Called for every tensor of the graph: `before` it is computed, to ask if it is wanted, and again with its values."""
        name = self._ggml.ggml_get_name(tensor).decode()
        wanted = name.startswith(BLOCK_OUTPUT)
        if wanted and not before:
            values = torch.empty(self._ggml.ggml_nelements(tensor))
            self._ggml.ggml_backend_tensor_get(tensor, values.data_ptr(), 0, values.nbytes)
            self._seen[f"hidden.{name.removeprefix(BLOCK_OUTPUT)}"] = values.view(self._length, -1)
        return wanted or not before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


def tensors_library() -> Any:
    """ggml's tensor functions, in the shared library next to llama.cpp's."""
    ggml = ctypes.CDLL(str(next((Path(library().__file__).parent / "lib").glob("*ggml-base.*"))))
    for name, result, arguments in (
        ("ggml_get_name", ctypes.c_char_p, [ctypes.c_void_p]),
        ("ggml_nelements", ctypes.c_int64, [ctypes.c_void_p]),
        ("ggml_backend_tensor_get", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    ):
        function = getattr(ggml, name)  # cached by ctypes, as `ggml[name]` is not
        function.restype, function.argtypes = result, arguments
    return ggml


class Weights:
    """The weights of `checkpoint`, dequantized by llama.cpp's own functions, rows in transformers' order."""

    def __init__(self, checkpoint: Path) -> None:
        self._source: Source = open_source(checkpoint)
        self._ggml = tensors_library()
        groups = self._source.config.get("quantization_config", {"config_groups": []})["config_groups"]
        self._blocks = {name: group["block"] for group in groups for name in group["targets"]}

    def read(self, layer: str, shape: tuple[int, int]) -> Tensor:
        """The weight of `layer`, float32 of `shape` (out, in)."""
        if layer not in self._blocks:
            return self._source.read(f"{layer}.weight").float()
        packed, block = self._source.read(f"{layer}.weight_blocks"), self._blocks[layer]
        values = torch.empty(shape)
        dequantize = self._ggml[f"dequantize_row_{block.lower().replace('_k', '_K')}"]
        dequantize.argtypes, dequantize.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
        dequantize(packed.data_ptr(), values.data_ptr(), values.numel())
        return values

"""A whole model as one GGUF file: names, metadata and tensors, streamed a tensor at a time.

GGUF's `llama` keeps the rows of the query and key projections in the order of interleaved rotary pairs, transformers in
halves: their rows are permuted per head. Embeddings and what else stays dense keep their float type; vectors are float32.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import UsageError
from ..checkpoint import Checkpoint
from ..gguf import blocks
from ..gguf.library import DENSE, PERMUTED, library
from .gguf_tokenizer import add_tokenizer

FILE = "model.gguf"
LABELS = {"Q4_K": "Q4_K_S"}  # the file types whose names are not the block's


def write(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write `folder/model.gguf` with the tokenizer in the same folder. Returns what was rounded.

    Raises `UsageError` for models that GGUF readers would not run.
    """
    gguf = library()
    config = checkpoint.model.config
    _check(config, checkpoint)
    writer = gguf.GGUFWriter(None, config.model_type)
    _add_config(writer, config, checkpoint)
    notes = add_tokenizer(writer, folder, config)
    names = _names(gguf, checkpoint)
    kinds: dict[str, blocks.Kind] = {
        name: blocks.kind(args, checkpoint.shape(name)[1]) for name, args in checkpoint.layers.items()
    }
    writer.add_file_type(_file_type(gguf, list(kinds.values())))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    others = checkpoint.others
    for name, kind in kinds.items():
        rows, columns = checkpoint.shape(name)
        shape = (rows, blocks.bytes_per_row(kind, columns))
        _announce(gguf, writer, names[f"{name}.weight"], shape, kind)
    for name, stored in others.items():
        spec = checkpoint.source.tensors[stored].spec
        dtype = torch.float32 if len(spec.shape) == 1 else spec.torch_dtype
        shape = (*spec.shape[:-1], spec.shape[-1] * dtype.itemsize)
        _announce(gguf, writer, names[name], shape, DENSE[dtype])
    writer.write_header_to_file(folder / FILE)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in kinds:
        packed = blocks.pack(name, checkpoint.layer(name))
        order = _row_order(f"{name}.weight", packed.shape[0], config)
        writer.write_tensor_data((packed if order is None else packed[order]).numpy())
    for name, stored in others.items():
        tensor = checkpoint.source.read(stored, check=True)
        order = _row_order(name, tensor.shape[0], config)
        writer.write_tensor_data(_dense_bytes(tensor if order is None else tensor[order]).numpy())
    writer.close()
    return notes + _notes(kinds, checkpoint)


def _check(config: Any, checkpoint: Checkpoint) -> None:
    rope = config.rope_parameters if config.model_type in PERMUTED else {}
    for wrong, what in (
        (config.model_type not in PERMUTED, f"models of type {config.model_type}"),
        (rope.get("rope_type", "default") != "default", f"rotary embeddings of type {rope.get('rope_type')}"),
        (getattr(config, "hidden_act", "silu") != "silu", f"the activation {getattr(config, 'hidden_act', None)}"),
        (getattr(config, "sliding_window", None) is not None, "sliding-window attention"),
    ):
        if wrong:
            raise UsageError(
                f"{checkpoint.source.path}: GGUF export does not know {what}", f"it writes {', '.join(PERMUTED)}"
            )


def _add_config(writer: Any, config: Any, checkpoint: Checkpoint) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(checkpoint.source.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _names(gguf: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """GGUF's name of every tensor, by the library's table for the architecture."""
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == checkpoint.model.config.model_type)
    table = gguf.get_tensor_name_map(arch, checkpoint.blocks[1])
    wanted = [*(f"{name}.weight" for name in checkpoint.layers), *checkpoint.others]
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in wanted}
    unknown = next((name for name, ours in found.items() if ours is None), None)
    if unknown is not None:
        raise UsageError(f"GGUF has no name for {unknown}", "export to fp32, fp16 or bf16")
    return found


def _announce(gguf: Any, writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Tell the file's header of a tensor, by its shape in bytes."""
    nbytes = int(torch.Size(shape).numel())
    byte = torch.empty(0, dtype=torch.uint8).numpy().dtype
    writer.add_tensor_info(name, shape, byte, nbytes, gguf.GGMLQuantizationType[kind])


def _row_order(name: str, rows: int, config: Any) -> Tensor | None:
    """The order in which GGUF keeps the rows of the parameter `name`; None if it is ours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or not PERMUTED[config.model_type]:
        return None
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _dense_bytes(tensor: Tensor) -> Tensor:
    values = tensor.float() if tensor.dim() == 1 else tensor
    return values.contiguous().view(torch.uint8)


def _file_type(gguf: Any, kinds: list[blocks.Kind]) -> int:
    """The label of the commonest block."""
    if not kinds:
        return gguf.LlamaFileType.ALL_F32
    commonest = max(dict.fromkeys(kinds), key=kinds.count)
    return gguf.LlamaFileType[f"MOSTLY_{LABELS.get(commonest, commonest)}"]


def _notes(kinds: dict[str, blocks.Kind], checkpoint: Checkpoint) -> list[str]:
    rounded: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        words = blocks.rounding(kind, checkpoint.layers[name])
        if words:
            rounded.setdefault(f"{kind}: {words}", []).append(name)
    return [f"{words} ({len(names)} layers, such as {names[0]})" for words, names in rounded.items()]

"""A GGUF file that anyone made, as a source: its metadata as a config, its tensors by transformers' names and in its order.

Linear layers in blocks that `blocks.py` knows stay packed, as `../kinds/gguf_blocks.py` has them. Any other tensor in blocks,
such as an embedding, becomes float32 when it is read. Metadata are read by the library gguf.
"""

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ....calibrate.model.safetensors_io import NAMES, StoredTensor, TensorSpec
from ....calibrate.model.source import Source
from ....errors import CompressError, UsageError
from ....recipes.parsing import readable
from ..kinds import gguf_blocks
from . import blocks
from .header import check_header
from .library import DENSE, PERMUTED, library

NUMBERS = {name: NAMES[dtype] for dtype, name in DENSE.items()}  # GGUF's name of a float type -> that of safetensors
OUTER = ("model.embed_tokens", "model.norm", "lm_head")
INNER = (
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
)
AGAIN = "download it again"
ONE_SPACE = [  # what sentencepiece does to spaces if it is configured so, and transformers leaves out
    {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    for pattern, content in ((r"\A +| +\z", ""), (" +", " "))
]
EPSILON = "attention.layer_norm_rms_epsilon"
# transformers' name of a setting: GGUF's, below the name of the architecture.
SETTINGS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": EPSILON,
}
SIZES = ("attention.head_count_kv", "attention.key_length", "rope.dimension_count")  # which may be absent


class GGUFSource(Source):
    """A source whose `path` is the file itself."""

    def copy_companions(self, folder: Path) -> None:
        """Write the tokenizer of the metadata into `folder`, if transformers can make one of them."""
        # The model is complete without a tokenizer; an error is raised when one is needed.
        with suppress(CompressError, OSError, ValueError, KeyError, ImportError):
            tokenizer_of(self.path).save_pretrained(folder)


@dataclass(frozen=True)
class FileTensor(StoredTensor):
    """A tensor of a GGUF file as transformers has it.

    heads  of a projection whose rows lie in pairs of rotary channels; 0: they lie in transformers' order
    block  the blocks that its numbers are unpacked from when they are read; None if they are stored as in `spec`
    """

    heads: int = 0
    block: blocks.Kind | None = None

    def read(self) -> Tensor:
        """Its values, in memory of their own."""
        held = StoredTensor(self.file, self._held(), self.start).read()
        if self.heads:
            held = held.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        return held if self.block is None else blocks.unpack(self.block, held).dequantize()

    def _held(self) -> TensorSpec:
        if self.block is None:
            return self.spec
        return TensorSpec("U8", (*self.spec.shape[:-1], blocks.bytes_per_row(self.block, self.spec.shape[-1])))


def open_gguf(file: Path) -> Source:
    """The model in `file`. Raises `UsageError` for what lmpress does not read in it, `CompressError` for a damaged file."""
    gguf = library("reading")
    try:
        with readable(file):
            check_header(file)
        reader = gguf.GGUFReader(file)
        lists = gguf.GGUFValueType.ARRAY  # of tokens, which take long
        metadata = {name: field.contents() for name, field in reader.fields.items() if lists not in field.types}
    except (ValueError, IndexError, KeyError, struct.error, OSError) as error:
        raise CompressError(f"{file} is not a complete GGUF file ({error})", AGAIN) from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(file, metadata, tensors)
    names = {theirs: ours for ours, theirs in _names(gguf, config)}
    unknown = next((name for name in tensors if name not in names), None)
    if unknown is not None:
        raise UsageError(f"{file}: lmpress does not know the tensor {unknown}", "load it with llama.cpp")
    found, packed = {}, {}
    for name, tensor in tensors.items():
        kind, placed = tensor.tensor_type.name, _placed(file, names[name], tensor, config)
        layer = names[name].removesuffix(".weight")
        if kind in blocks.BLOCKS and layer != OUTER[0]:
            packed[layer] = kind
            found[f"{layer}.weight_blocks"] = placed
        else:
            found[names[name]] = placed
    if packed:
        config["quantization_config"] = gguf_blocks.config_of(packed, [])
    return GGUFSource(file, str(metadata.get("general.name", file.stem)), config, found)


def tokenizer_of(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the metadata, as transformers converts it, without the tokens that it adds of its own.

    Raises what transformers raises if it cannot.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, described, options = get_gguf_tokenizer(str(file))
    if not described.get("tokens"):
        raise ValueError("its metadata hold no tokens")
    converted = json.loads(convert_gguf_tokenizer(architecture, described)[0].to_str())
    converted["added_tokens"] = [t for t in converted["added_tokens"] if t["id"] < len(described["tokens"])]
    collapsing = library("reading").GGUFReader(file).get_field("tokenizer.ggml.remove_extra_whitespaces")
    if collapsing is not None and collapsing.contents() and converted["normalizer"] is None:
        converted["normalizer"] = {"type": "Sequence", "normalizers": ONE_SPACE}
        converted["pre_tokenizer"]["prepend_scheme"] = "always"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(converted)), **options)


def _config(file: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json."""
    kind = metadata.get("general.architecture")
    own = {name.removeprefix(f"{kind}."): value for name, value in metadata.items() if name.startswith(f"{kind}.")}
    _check_numbers(file, kind, metadata)
    _check(file, kind, own, metadata, tensors)
    try:
        config: dict[str, Any] = {ours: own[theirs] for ours, theirs in SETTINGS.items()}
        heads = config["num_attention_heads"]
        vocabulary = int(tensors["token_embd.weight"].shape[1])
    except KeyError as error:
        raise CompressError(f"{file} has no {error.args[0]}", AGAIN) from error
    except IndexError as error:
        raise CompressError(f"{file}: token_embd.weight is not a matrix", AGAIN) from error
    if config["num_hidden_layers"] > len(tensors):
        raise CompressError(
            f"{file}: {kind}.block_count is {config['num_hidden_layers']}, and there are {len(tensors)} tensors", AGAIN
        )
    special = {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")
    }
    return config | {
        "model_type": kind,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": own.get("attention.key_length", config["hidden_size"] // heads),
        "rope_parameters": {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)},
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "hidden_act": "silu",
        "bos_token_id": special["bos_token_id"],
        "eos_token_id": special["eos_token_id"],
        "pad_token_id": special["padding_token_id"],
        "dtype": "float32",
    }


def _check_numbers(file: Path, kind: object, metadata: dict[str, Any]) -> None:
    """Raise `CompressError` if a setting is not a number, or a size is not a whole one of at least 1."""
    for name in (*SETTINGS.values(), *SIZES):
        value = metadata.get(f"{kind}.{name}", 1)
        if not (isinstance(value, float) and name == EPSILON) and (type(value) is not int or value < 1):
            raise CompressError(f"{file}: {kind}.{name} must be a whole number of at least 1, got {value!r}", AGAIN)
    for name in ("split.count", f"{kind}.expert_count", f"{kind}.rope.freq_base"):
        value = metadata.get(name, 0)
        if type(value) not in (int, float):
            raise CompressError(f"{file}: {name} must be a number, got {value!r}", AGAIN)


def _check(
    file: Path, kind: str | None, own: dict[str, Any], metadata: dict[str, Any], tensors: dict[str, Any]
) -> None:
    """Raise `UsageError` for models that a config of default settings does not describe."""
    head = own.get("attention.key_length", own.get("rope.dimension_count"))
    for wrong, what, hint in (
        (kind not in PERMUTED, f"the architecture {kind}", f"lmpress reads {', '.join(PERMUTED)}"),
        (metadata.get("split.count", 0) > 1, "one of several parts", "join them with llama-gguf-split --merge"),
        (own.get("rope.scaling.type", "none") != "none", "scaled rotary embeddings", "load it with llama.cpp"),
        ("rope_freqs.weight" in tensors, "scaled rotary embeddings", "load it with llama.cpp"),
        (own.get("rope.dimension_count", head) != head, "partly rotated heads", "load it with llama.cpp"),
        (own.get("expert_count", 0) > 0, "a mixture of experts", "load it with llama.cpp"),
    ):
        if wrong:
            raise UsageError(f"{file} has {what}", hint)


def _names(gguf: Any, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """transformers' and GGUF's name of every parameter that there may be, by the library's table."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == config["model_type"])
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    layers = [f"model.layers.{index}.{part}" for index in range(config["num_hidden_layers"]) for part in INNER]
    for name in (*OUTER, *layers):
        for suffix in (".weight", ".bias"):
            theirs = table.get_name(name + suffix, try_suffixes=(".weight", ".bias"))
            if theirs is not None:
                yield name + suffix, theirs


def _placed(file: Path, name: str, tensor: Any, config: dict[str, Any]) -> FileTensor:
    """Where the values of the parameter `name` lie, and how."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    of_heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    heads = int(config[of_heads]) if of_heads and PERMUTED[config["model_type"]] else 0
    start, kind = int(tensor.data_offset), tensor.tensor_type.name
    if kind in NUMBERS:
        return FileTensor(file, TensorSpec(NUMBERS[kind], shape), start, heads)
    block: blocks.Kind | None = next((block for block in blocks.BLOCKS if block == kind), None)
    if block is None:
        known = ", ".join((*NUMBERS, *blocks.BLOCKS))
        raise UsageError(f"{file}: {tensor.name} is stored as {kind}", f"lmpress reads {known}")
    if name == f"{OUTER[0]}.weight":
        return FileTensor(file, TensorSpec("F32", shape), start, heads, block)
    return FileTensor(file, TensorSpec("U8", (shape[0], blocks.bytes_per_row(block, shape[1]))), start, heads)

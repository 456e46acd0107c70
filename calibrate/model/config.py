"""A model's config.json as transformers has it: sizes are compared with the weight files, errors name file and value."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from ...errors import UsageError
from .source import CONFIG, Source

# What transformers raises for values in a config that it does not expect: it checks few of them before it uses them.
REFUSALS = (
    StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError,
    AssertionError, OSError, EOFError,
)  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_shared_experts")
WIDTH = ("hidden_size", "n_embd", "d_model", "embedding_size")
SIZES = (  # of matrices that have WIDTH as their other size
    *(
        "vocab_size",
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ),
    *("head_dim", "num_attention_heads", "num_key_value_heads", "n_head"),
)
PACKED = 32  # weights in one number of a tensor, at most
DAMAGED = "correct the value, or download the file again"


def config_of(source: Source) -> PreTrainedConfig:
    """The config as a transformers object; nothing of it is built yet.

    Raises `UsageError` if transformers does not support the architecture or refuses a value, or if the weight files cannot hold
    what a size in it asks for.
    """
    check_sizes(source)
    with refusals_named(source):
        if source.path.is_dir():
            config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(**source.config)
    vars(config).pop("quantization_config", None)  # our packed modules replace transformers' own loading
    return config


def file_of(source: Source) -> Path:
    """The file that the config is from: config.json, or the GGUF file."""
    return source.path / CONFIG if source.path.is_dir() else source.path


@contextmanager
def refusals_named(source: Source) -> Iterator[None]:
    """Raise `UsageError` with the file and, if it can be found, the key and value that transformers refuses."""
    try:
        yield
    except REFUSALS as error:
        raise UsageError(
            f"{file_of(source)} does not describe a language model that transformers supports: "
            f"{reason_of(error, source.config)}",
            DAMAGED,
        ) from error


def reason_of(error: Exception, config: Mapping[str, Any] = MappingProxyType({})) -> str:
    """The message of a refusal in one line; for a look-up that failed, the key of `config` whose value was looked up."""
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        wanted = error.args[0]
        key = next((key for key, value in _leaves(config) if value == wanted), None)
        return f"it lacks {wanted!r}" if key is None else f"{key} is {wanted!r}, which transformers does not know"
    words = " ".join(str(error).split())[:300]
    explains = isinstance(error, ValueError | OSError | StrictDataclassError) and words
    return words if explains else f"{type(error).__name__}: {words}"


def _leaves(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a config."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def check_sizes(source: Source) -> None:
    """Raise `UsageError` if the weight files cannot hold a size that the config states: nothing so large is ever built.

    A layer or an expert has a tensor at least, or a slice of one; a matrix has a bit per weight at least.
    """
    bits = 8 * sum(tensor.spec.nbytes for tensor in source.tensors.values())
    slices = max((tensor.spec.shape[0] for tensor in source.tensors.values() if len(tensor.spec.shape) > 2), default=0)
    longest = max((size for tensor in source.tensors.values() for size in tensor.spec.shape), default=0)
    for place, config in _configs(source.config):
        width = next((config[key] for key in WIDTH if type(config.get(key)) is int), 1)
        limits = dict.fromkeys(WIDTH, PACKED * longest) | dict.fromkeys(LAYERS, len(source.tensors))
        limits |= dict.fromkeys(EXPERTS, max(slices, len(source.tensors))) | dict.fromkeys(SIZES, bits // max(1, width))
        for key, most in limits.items():
            size = config.get(key)
            if type(size) is int and not 0 <= size <= most:
                raise UsageError(
                    f"{file_of(source)}: {place}{key} is {size}, and the weight files have room for at most {most:,}",
                    DAMAGED,
                )


def _configs(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and those inside it, as models with several parts have them, with what their keys begin with."""
    yield "", config
    parts = {key: part for key, part in config.items() if key != "quantization_config" and isinstance(part, Mapping)}
    yield from ((f"{key}.", part) for key, part in parts.items())

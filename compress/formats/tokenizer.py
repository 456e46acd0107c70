"""The tokenizer of a model: its files, or the metadata of a GGUF file."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...calibrate.model.config import DAMAGED, reason_of
from ...calibrate.model.source import CONFIG, gguf_file
from ...errors import CompressError
from .gguf.source import tokenizer_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
COPY = "copy the original model's tokenizer files into this folder"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; code that comes with it is never run.

    Raises `CompressError` if there is none, or if it cannot be read or does not tokenise a short text.
    """
    if not has_tokenizer(path):
        raise CompressError(f"{path} has no tokenizer", COPY)
    file = gguf_file(Path(path)) if Path(path).exists() else None
    try:
        if file is not None and not _tokenizer_files(file.parent if Path(path).is_dir() else file):
            tokenizer = tokenizer_of(file)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("a", verbose=False)  # settings of the wrong type are used here for the first time
    except CompressError:
        raise
    except StrictDataclassError as error:  # transformers reads the config to find the tokenizer's class
        raise CompressError(f"{Path(path) / CONFIG} is not valid: {reason_of(error)}", DAMAGED) from error
    except Exception as error:  # the library tokenizers, which is not written in Python, raises Exception itself
        raise CompressError(f"the tokenizer of {path} cannot be read ({reason_of(error)})", COPY) from error
    return tokenizer


def has_tokenizer(path: str | Path) -> bool:
    """Whether the folder holds a tokenizer's vocabulary; a path that is not a folder is assumed to hold one."""
    return not Path(path).is_dir() or _tokenizer_files(Path(path)) or gguf_file(Path(path)) is not None


def _tokenizer_files(path: Path) -> bool:
    return any((path / name).is_file() for name in TOKENIZER_FILES)

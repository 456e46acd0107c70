"""The tokenizer of a model: its files, or the metadata of a GGUF file."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...calibrate.model.source import gguf_file
from ...errors import CompressError
from .gguf.source import tokenizer_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; code that comes with it is never run. Raises CompressError when there is none."""
    if not has_tokenizer(path):
        raise CompressError(f"{path} has no tokenizer", "copy the original model's tokenizer files into this folder")
    file = gguf_file(Path(path)) if Path(path).exists() else None
    try:
        if file is not None and not _tokenizer_files(file.parent if Path(path).is_dir() else file):
            return tokenizer_of(file)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompressError(
            f"the tokenizer of {path} cannot be read ({reason})",
            "copy the original model's tokenizer files into this folder",
        ) from error


def has_tokenizer(path: str | Path) -> bool:
    """Whether the folder holds a tokenizer's vocabulary; a path that is not a folder is assumed to hold one."""
    return not Path(path).is_dir() or _tokenizer_files(Path(path)) or gguf_file(Path(path)) is not None


def _tokenizer_files(path: Path) -> bool:
    return any((path / name).is_file() for name in TOKENIZER_FILES)

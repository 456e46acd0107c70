"""The original model on disk: its config and the headers of its weight files. Tensors are read one by one, on demand."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from ...errors import CompressError, UsageError
from ...recipes.parsing import parse_json, readable
from .safetensors_io import INDEX, StoredTensor

CONFIG, GGUF = "config.json", ".gguf"
PIECE = 2**22  # values that are converted to float32 at a time
# Files of a checkpoint, apart from config and weights, that belong to the model whatever its weights are stored as.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "preprocessor_config.json",
    "LICENSE*",
    "cache_ranges.lmpress",  # of a quantized cache (compress/formats/kv_cache.py)
)


@dataclass(frozen=True)
class Source:
    """A Hugging Face directory or a GGUF file: its `path`, `name`, parsed `config`, and the location of its `tensors`."""

    path: Path
    name: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """The size of its weight files in bytes."""
        return sum(file.stat().st_size for file in self._files)

    @property
    def _files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the config and the weight files."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self._files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def companions(self) -> dict[str, str]:
        """SHA-256 (hex) of the files that `copy_companions` copies, by name. Raises `UsageError` as that does."""
        found = {}
        for file in self._companions():
            with file.open("rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found

    def _companions(self) -> list[Path]:
        found = {file for pattern in COMPANIONS for file in self.path.glob(pattern) if file.is_file()}
        foreign = next((file for file in sorted(found) if not _belongs(file, self.path)), None)
        if foreign is not None:
            raise UsageError(
                f"{foreign} is a symbolic link to a file outside the model folder",
                "replace the link by the file itself",
            )
        return sorted(found)

    def read(self, name: str, check: bool = False) -> Tensor:
        """The tensor `name` in its stored dtype. With `check`, raises `CompressError` if it holds NaN or infinite values."""
        tensor = self.tensors[name].read()
        if check and tensor.is_floating_point() and not is_finite(tensor):
            raise CompressError(
                f"{name} in {self.tensors[name].file} holds NaN or infinite values",
                "the checkpoint is damaged: download it again",
            )
        return tensor

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer, generation config, licence and the like (`COMPANIONS`) into `folder`.

        Raises `UsageError` if one is a symbolic link to a file outside the model folder (links of the Hugging Face cache to its
        own files are followed).
        """
        for file in self._companions():
            shutil.copyfile(file, folder / file.name)


def _belongs(file: Path, folder: Path) -> bool:
    """Whether the file lies in the model folder, or is a link of the Hugging Face cache to its own files."""
    target, home = file.resolve(), folder.resolve()
    cached = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    return target.is_relative_to(home) or cached


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. Computed from the minimum and maximum: a mask takes memory and 100 times as long."""
    if tensor.dtype.itemsize == 1:  # aminmax does not support float8
        return all(is_finite(piece.float()) for piece in tensor.flatten().split(PIECE))
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def gguf_file(path: Path) -> Path | None:
    """`path` if it is a GGUF file, or the GGUF file of the folder `path` if that has no config.json; else None.

    Raises `UsageError` if the folder holds several.
    """
    if path.is_file() or (path / CONFIG).is_file():
        return path if path.is_file() and path.suffix == GGUF else None
    files = sorted(path.glob(f"*{GGUF}"))
    if len(files) > 1:
        raise UsageError(f"{path} holds {len(files)} GGUF files", f"give one of them, for example {files[0]}")
    return files[0] if files else None


def fetch(model: str) -> Path:
    """Download `model` (`org/name`) from the Hugging Face Hub, weights in safetensors only; returns the local folder.

    Raises `UsageError` if `model` looks like a path, which is not looked up there, or if it cannot be downloaded.
    """
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise UsageError(f"{model}: no such directory", "give a local model directory, or org/name of a hub model")
    try:
        folder = snapshot_download(model, allow_patterns=[CONFIG, "*.safetensors", INDEX, *COMPANIONS])
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UsageError(
            f"{model}: not a local directory, and it could not be downloaded from the Hugging Face Hub: {reason}",
            "check the name and the network connection",
        ) from error
    return Path(folder)


def read_config(path: Path) -> dict[str, Any]:
    """The parsed config.json of the folder `path`.

    Raises `UsageError` if there is none and `CompressError` if it is not a JSON object.
    """
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"{path} has no {CONFIG}", "give a Hugging Face model directory")
    return read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises `CompressError` if there is none, and `UsageError` if the file cannot be read."""
    with readable(file):
        text = file.read_bytes()
    try:
        found = parse_json(text)
    except ValueError as error:
        raise CompressError(f"{file} is not valid JSON ({error})", "download it again") from error
    if not isinstance(found, dict):
        raise CompressError(f"{file} is not a JSON object", "download it again")
    return found


def _indexed(index: Path) -> set[str]:
    """The shards listed in an index, which must be files in the same folder."""
    try:
        names = set(read_object(index)["weight_map"].values())
        outside = next((name for name in names if Path(name).name != name), None)
    except (KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{index} is not a valid index of weight files ({error})", "download it again") from error
    if outside is not None:
        raise CompressError(f"{index} lists {outside}, a file outside its folder", "do not trust this checkpoint")
    return names


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the folder `path`: those of its index, or all if it has no index.

    Raises `UsageError` if there are none, and `CompressError` if one is missing or the index is invalid.
    """
    index = path / INDEX
    files = [path / name for name in sorted(_indexed(index))] if index.is_file() else sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CompressError(
            f"{path} lacks {', '.join(missing)}, listed in its index", "the download is incomplete: repeat it"
        )
    if not files:
        other = next((f.name for f in sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))), None)
        found = f"only {other}" if other else "no weights"
        raise UsageError(f"{path} has {found}", "safetensors files are required; pickled weights are never opened")
    return files

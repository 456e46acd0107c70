"""The original model on disk: its config and the headers of its weight files. Nothing is loaded until it is asked for."""

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
from .safetensors_io import INDEX, StoredTensor

CONFIG, GGUF = "config.json", ".gguf"
PIECE = 2**22  # values
# What a checkpoint holds beside its weights and belongs to the model rather than to its storage.
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
    "cache_ranges.lmpress",  # of a packed cache (compress/formats/kv_cache.py)
)


@dataclass(frozen=True)
class Source:
    """A Hugging Face directory, or a GGUF file: `path`, its parsed `config`, and where each of its `tensors` lies."""

    path: Path
    name: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """The size of its weight files."""
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

    def read(self, name: str, check: bool = False) -> Tensor:
        """The stored tensor `name`, in its own dtype; with `check`, `CompressError` names it where it holds NaN or Inf."""
        tensor = self.tensors[name].read()
        if check and tensor.is_floating_point() and not is_finite(tensor):
            raise CompressError(
                f"{name} in {self.tensors[name].file} holds NaN or infinite values",
                "the checkpoint is damaged: fetch it again",
            )
        return tensor

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer, generation config and licence into `folder`."""
        for pattern in COMPANIONS:
            for file in sorted(self.path.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are: their extremes tell, which take a hundredth of the time and none of the memory of a mask."""
    if tensor.dtype.itemsize == 1:  # has no extremes
        return all(is_finite(piece.float()) for piece in tensor.flatten().split(PIECE))
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that lies in a folder without config.json; None where there is none.

    Raises `UsageError` where there are several.
    """
    if path.is_file() or (path / CONFIG).is_file():
        return path if path.is_file() and path.suffix == GGUF else None
    files = sorted(path.glob(f"*{GGUF}"))
    if len(files) > 1:
        raise UsageError(f"{path} holds {len(files)} GGUF files", f"give one of them, for example {files[0]}")
    return files[0] if files else None


def fetch(model: str) -> Path:
    """Download the hub's `model`, weights in safetensors only. A string that looks like a path is not looked up."""
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise UsageError(f"{model}: no such directory", "give a local model directory, or org/name of a hub model")
    try:
        folder = snapshot_download(model, allow_patterns=[CONFIG, "*.safetensors", INDEX, *COMPANIONS])
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UsageError(
            f"{model}: no such directory, and the hub has not given it ({reason})", "check the name and the network"
        ) from error
    return Path(folder)


def read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"{path} has no {CONFIG}", "give a Hugging Face model directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressError(f"{file} is not valid JSON ({error})", "fetch it again") from error
    if not isinstance(config, dict):
        raise CompressError(f"{file} holds no JSON object", "fetch it again")
    return config


def _indexed(index: Path) -> set[str]:
    """The shards that an index names, which must be files of its own folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = next((name for name in names if Path(name).name != name), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{index} is no index of weight files ({error})", "fetch it again") from error
    if outside is not None:
        raise CompressError(f"{index} names {outside}, a file outside its folder", "do not trust this checkpoint")
    return names


def weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    files = [path / name for name in sorted(_indexed(index))] if index.is_file() else sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CompressError(
            f"{path} lacks {', '.join(missing)}, which its index names", "the download is incomplete: fetch it again"
        )
    if not files:
        other = next((f.name for f in sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))), None)
        found = f"only {other}" if other else "no weights"
        raise UsageError(f"{path} has {found}", "safetensors files are needed; pickled weights are never opened")
    return files

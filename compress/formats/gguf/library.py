"""The `gguf` package, imported only when it is needed, and the facts that reading and writing share."""

from typing import Any

import torch

from ....errors import UsageError

# Model types that are written, and whether their query and key rows are permuted.
PERMUTED = {"llama": True, "qwen2": False, "qwen3": False}
DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def library(doing: str = "writing") -> Any:
    """The package gguf. Raises `UsageError` if it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UsageError(f"{doing} GGUF needs the package gguf", "pip install 'lmpress[gguf]'") from error
    return gguf

"""Opening a model wherever it comes from: a directory, a GGUF file, or the Hugging Face Hub."""

from pathlib import Path

from ...calibrate.model.safetensors_io import read_header
from ...calibrate.model.source import Source, fetch, gguf_file, read_config, weight_files
from ...errors import UsageError
from ...recipes.parsing import readable
from .gguf.source import open_gguf


def open_source(model: str | Path) -> Source:
    """The local directory, GGUF file or hub id `model`.

    Raises `UsageError` if there is no such directory, or if it is not a model directory or cannot be read, and
    `CompressError` for damaged files.
    """
    path = Path(model)
    with readable(path):
        local = path.exists()
    if not local:
        path = fetch(str(model))
    with readable(path):
        file = gguf_file(path)
    if file is not None:
        return open_gguf(file)
    if not path.is_dir():
        raise UsageError(f"{path} is a file", "give the directory that holds config.json and the weights, or a .gguf")
    config = read_config(path)
    tensors = {name: tensor for file in weight_files(path) for name, tensor in read_header(file).items()}
    return Source(path, path.resolve().name if local else str(model), config, tensors)

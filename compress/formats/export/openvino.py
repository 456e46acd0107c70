"""A whole Llama as OpenVINO's IR: the graph of `onnx.py`, taken over by OpenVINO itself.

    openvino_model.xml   the graph; layers keep their names, as do `input_ids`, `logits` and `hidden.N`
    openvino_model.bin   codes as u4, u8 or u2 constants `[out, groups, group]`, zeros likewise, scales in float32

A quantized layer is Multiply(Subtract(Convert(codes), Convert(zeros)), scales) before its MatMul, which OpenVINO's plugins keep
packed. The ONNX files are gone when it stands.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from ....errors import UsageError
from ..checkpoint import Checkpoint
from . import onnx

FILE = "openvino_model.xml"


def write(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write `folder/openvino_model.xml`, its .bin and config.json. Returns what is not as asked.

    Raises `UsageError` if the package is missing, and for the models that ONNX export does not know.
    """
    openvino = _library()
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as between:
        notes = onnx.write(checkpoint, Path(between))
        core = openvino.Core()
        core.set_property(
            {"ENABLE_MMAP": False}
        )  # maps of the files would count in addition to the constants made of them
        openvino.save_model(core.read_model(Path(between) / onnx.FILE), folder / FILE, compress_to_fp16=False)
    config = {key: value for key, value in checkpoint.source.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return [note.replace("MatMulNBits", "packed layer of OpenVINO") for note in notes]


def _library() -> Any:
    try:
        import openvino  # pyright: ignore[reportMissingImports]  (verified in an environment of its own)
    except ModuleNotFoundError as error:
        raise UsageError(
            "writing OpenVINO's IR needs the package openvino", "pip install 'lmpress[openvino]'"
        ) from error
    return openvino

"""Write a checkpoint in another runtime's format. Nothing is solved again: codes and scales are taken over as they are."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibrate.model.moe import checkpoint_module_names
from ..errors import UsageError
from ..recipes.scheme import CACHE_KEY, QuantArgs, WeightArgs, kinds
from .formats import pack_quantized as packed
from .formats.checkpoint import Checkpoint
from .formats.export import gguf_model, onnx, openvino
from .formats.export.awq import AWQ
from .formats.export.bitsandbytes import BITSANDBYTES
from .formats.export.dense import DTYPES, dense
from .formats.export.gptq import GPTQ, GPTQ_V2, has_zero_of_zero
from .formats.export.layout import LayerFormat, write_tensors
from .output.record import weight_files
from .output.target import appearing, claimed

PACKED = LayerFormat(packed.NAME, lambda args, shape: packed.supports(args), packed.pack, packed.quantization_config)
LAYER_FORMATS = {each.name: each for each in (PACKED, GPTQ, GPTQ_V2, AWQ, BITSANDBYTES, *map(dense, DTYPES))}


@dataclass(frozen=True)
class ExportReport:
    """What was written: `notes` list every place where the result is not the checkpoint bit for bit, or not as asked."""

    out: Path
    format: str
    notes: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"out": str(self.out), "notes": list(self.notes)}


def export(checkpoint: str | Path, out: str | Path, *, format: str, overwrite: bool = False) -> ExportReport:  # noqa: A002
    """Write `checkpoint` (a directory that `load` reads) into the directory `out` in the format called `format`.

    Raises `UsageError` for an unknown format or one that cannot hold the checkpoint, naming the layer and the reason;
    nothing was written then. `out` appears only when it is complete.
    """
    started, target = time.monotonic(), Path(out)
    write = _writer(format)
    opened = Checkpoint.open(checkpoint)
    with claimed(target, overwrite, opened.source.path), appearing(target) as folder:
        opened.source.copy_companions(folder)
        notes = write(opened, folder)
        written = sum(file.stat().st_size for file in weight_files(folder))
    return ExportReport(target, format, tuple(notes), opened.source.nbytes, written, time.monotonic() - started)


Writer = Callable[[Checkpoint, Path], list[str]]
WHOLE_FILES: dict[str, Writer] = {"gguf": gguf_model.write, "onnx": onnx.write, "openvino": openvino.write}


def formats() -> list[str]:
    """The names that `export` knows."""
    return [*LAYER_FORMATS, *WHOLE_FILES]


def _writer(name: str) -> Writer:
    if name in LAYER_FORMATS:
        return lambda checkpoint, folder: _write_layers(LAYER_FORMATS[name], checkpoint, folder)
    if name in WHOLE_FILES:
        return WHOLE_FILES[name]
    raise UsageError(f"unknown format {name!r}", f"formats: {', '.join(formats())}")


def _write_layers(wanted: LayerFormat, checkpoint: Checkpoint, folder: Path) -> list[str]:
    """A safetensors checkpoint."""
    _check(wanted, checkpoint)
    chosen, notes = _without_zero_of_zero(wanted, checkpoint)
    if wanted.dtype not in (None, torch.float32):
        notes.append(f"weights are rounded to {wanted.name}")
    others = checkpoint.others
    if wanted is PACKED:
        others |= {name: name for name in checkpoint.cache_scales}
    elif checkpoint.cache_scales:
        notes.append(f"the cache stays in full precision: {wanted.name} has no place for its scales")
    called = checkpoint_module_names(
        checkpoint.model, {*checkpoint.layers, *(name.rpartition(".")[0] for name in others)}
    )
    _write_configs(chosen, checkpoint, called, folder)
    write_tensors(
        folder,
        chosen,
        {name: (checkpoint.shape(name), args) for name, args in checkpoint.layers.items()},
        checkpoint.layer,
        {name: checkpoint.source.tensors[stored].spec for name, stored in others.items()},
        lambda name: checkpoint.source.read(others[name], check=True),
        checkpoint.is_conv1d,
        called,
    )
    return notes


def _write_configs(chosen: LayerFormat, checkpoint: Checkpoint, called: Mapping[str, str], folder: Path) -> None:
    carried = dict(checkpoint.source.config)
    before = carried.pop("quantization_config", {})
    config = {key: value for key, value in carried.items() if key != "torch_dtype"}
    if chosen.dtype is not None:
        config["dtype"] = str(chosen.dtype).removeprefix("torch.")
    quantized = {called.get(n, n): args for n, args in checkpoint.layers.items() if isinstance(args, QuantArgs)}
    quantization = chosen.config(quantized, [called.get(n, n) for n in checkpoint.dense]) if quantized else None
    if checkpoint.cache_scales and chosen is not PACKED:
        config.pop(CACHE_KEY, None)
    elif checkpoint.cache_scales and quantization is not None:
        quantization["kv_cache_scheme"] = before["kv_cache_scheme"]
    if quantization is not None:
        config["quantization_config"] = quantization
    if quantization is not None and quantization["quant_method"] == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n")  # older readers' place
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _check(wanted: LayerFormat, checkpoint: Checkpoint) -> None:
    for name, args in checkpoint.layers.items():
        reason = None if wanted.dense else _reason(wanted, checkpoint, name, args)
        if reason is not None:
            raise UsageError(f"{name} cannot be exported: {reason}", "export to fp32, fp16 or bf16, or quantize it so")


def _reason(wanted: LayerFormat, checkpoint: Checkpoint, name: str, args: WeightArgs) -> str | None:
    """Why a format of other runtimes cannot hold the layer, None if it can."""
    if args.kind not in wanted.kinds or not isinstance(args, QuantArgs):
        return f"{wanted.name} does not store {args.kind} weights ({kinds.kind_of(args).label(args)})"
    if checkpoint.is_embedding(name) and wanted is not PACKED:
        return f"{wanted.name} cannot read a packed embedding"
    if checkpoint.is_conv1d(name):
        return f"{wanted.name} readers serve plain linear layers, this is a Conv1D"
    return wanted.supports(args, checkpoint.shape(name))


def _without_zero_of_zero(wanted: LayerFormat, checkpoint: Checkpoint) -> tuple[LayerFormat, list[str]]:
    """Version 2 in place of GPTQ's version 1 if a zero is 0."""
    if wanted is not GPTQ:
        return wanted, []
    name = next((name for name in checkpoint.layers if _has_zero_of_zero(checkpoint, name)), None)
    if name is None:
        return wanted, []
    return GPTQ_V2, [f"written as {GPTQ_V2.name}: {name} has a zero of 0, which {GPTQ.name} cannot store"]


def _has_zero_of_zero(checkpoint: Checkpoint, name: str) -> bool:
    args = checkpoint.layers[name]
    return isinstance(args, QuantArgs) and not args.symmetric and has_zero_of_zero(checkpoint.layer(name))

"""One wrong nibble, one wrong scale, two swapped lines: `verify` finds each in an export of any format, and
names tensor and block. Files are changed byte by byte; the runtimes run in this process, which takes no time to start."""

import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lmpress
from lmpress.calibrate.model import safetensors_io
from lmpress.compress.output.record import RECORD
from lmpress.eval import runtimes, verify
from lmpress.recipes.schema import Recipe

LAYER, ROWS, COLUMNS = "model.layers.1.mlp.up_proj", 160, 64


@dataclass(frozen=True)
class Place:
    """The place of a layer in `file`: its codes start at `codes` in lines of `line` bytes; scales have the format `struct`."""

    file: Path
    codes: int
    line: int
    scale: int
    kind: str


def stored(codes: str, scale: str, line: int, kind: str = "e") -> Callable[[Path], Place]:
    """A place in a safetensors file, by the last names of two tensors."""

    def find(folder: Path) -> Place:
        tensors = safetensors_io.read_header(folder / "model.safetensors")
        return Place(
            folder / "model.safetensors",
            tensors[f"{LAYER}.{codes}"].start,
            line,
            tensors[f"{LAYER}.{scale}"].start,
            kind,
        )

    return find


def in_gguf(folder: Path) -> Place:
    """Q4_0: every block of 32 begins with its scale."""
    gguf = pytest.importorskip("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    start = int(tensors["blk.1.ffn_up.weight"].data_offset)
    return Place(folder / "model.gguf", start + 2, COLUMNS // 32 * 18, start, "e")


def in_onnx(folder: Path) -> Place:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    starts = {}
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        starts[tensor.name] = int(entries.get("offset", -1))
    return Place(folder / "model.onnx.data", starts[f"{LAYER}.B"], COLUMNS // 2, starts[f"{LAYER}.scales"], "f")


def in_openvino(folder: Path) -> Place:
    constants = {
        each.get("name"): each.find("data") for each in ElementTree.parse(folder / "openvino_model.xml").iter("layer")
    }
    starts = {part: int(constants[f"{LAYER}.{part}"].attrib["offset"]) for part in ("B", "scales")}
    return Place(folder / "openvino_model.bin", starts["B"], COLUMNS // 2, starts["scales"], "f")


FORMATS: dict[str, tuple[str, Callable[[Path], Place]]] = {
    "pack-quantized": ("lmpress", stored("weight_packed", "weight_scale", COLUMNS // 2)),
    "gptq": ("lmpress", stored("qweight", "scales", 4 * ROWS)),
    "gptq_v2": ("lmpress", stored("qweight", "scales", 4 * ROWS)),
    "awq": ("lmpress", stored("qweight", "scales", ROWS // 2)),
    "int-quantized": ("lmpress", stored("weight", "weight_scale", COLUMNS)),
    "bitsandbytes": ("lmpress", stored("weight", "weight.nested_absmax", COLUMNS // 2, "f")),
    "gguf": ("gguf-transformers", in_gguf),
    "onnx": ("onnxruntime", in_onnx),
    "openvino": ("openvino", in_openvino),
}
TOKENS = {"bits": 8, "strategy": "token", "group_size": None, "formula": "signed", "dynamic": True}
ROWWISE = {"bits": 8, "strategy": "channel", "group_size": None, "formula": "signed"}
PASSES: dict[str, dict[str, Any]] = {  # for formats that a method itself writes; the others are exports
    "pack-quantized": {"method": "rtn", "scheme": {"weights": {"group_size": 32}}},
    "int-quantized": {"method": "rtn", "scheme": {"weights": ROWWISE, "inputs": TOKENS}},
    "bitsandbytes": {"method": "nf4"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corrupt") / "model"
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=COLUMNS,
        intermediate_size=ROWS,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's process, without the process."""

    def run(module: str, arguments: list[str], python: None) -> subprocess.CompletedProcess[str]:
        runtimes.main(*arguments)
        return subprocess.CompletedProcess(module, 0, "", "")

    monkeypatch.setattr(verify, "run_module", run)


def nibble(content: bytearray, place: Place) -> None:
    content[place.codes + 37] ^= 1


def scale(content: bytearray, place: Place) -> None:
    (value,) = struct.unpack_from(f"<{place.kind}", content, place.scale)
    struct.pack_into(f"<{place.kind}", content, place.scale, 1.5 * value)


def permutation(content: bytearray, place: Place) -> None:
    """Swap lines 2 and 3."""
    first, second, end = (place.codes + n * place.line for n in (2, 3, 4))
    content[first:end] = content[second:end] + content[first:second]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", FORMATS)
def test_one_corruption_of_an_export_is_found_and_named(model: Path, tmp_path: Path, name: str) -> None:
    runtime, find = FORMATS[name]
    if runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
    recipe = Recipe.model_validate({"passes": [PASSES.get(name, PASSES["pack-quantized"])]})
    reference = lmpress.run(model, tmp_path / "reference", recipe).out
    out = lmpress.run(model, tmp_path / "q", recipe).out
    if name not in PASSES:
        out = lmpress.export(tmp_path / "q", tmp_path / "out", format=name).out
    (sound,) = lmpress.verify(out, against=reference, runtime=[runtime]).findings
    assert sound.ok and sound.steps < 1e-4, sound
    (out / RECORD).unlink()  # its checksums would find every change before a runtime is asked
    place = find(out)
    whole = place.file.read_bytes()
    for corrupt in (nibble, scale, permutation):
        content = bytearray(whole)
        corrupt(content, place)
        assert content != whole
        place.file.write_bytes(content)
        (found,) = lmpress.verify(out, against=reference, runtime=[runtime]).findings
        assert not found.ok and found.error is None, corrupt
        assert found.wrong_layers == (LAYER,) and found.worst_layer == LAYER, corrupt
        assert found.block == 1, corrupt

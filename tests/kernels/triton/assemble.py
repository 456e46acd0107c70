"""Compiles the kernels to machine code, without a GPU, and prints facts about it as JSON.

    python tests/kernels/triton/assemble.py [NAME ...]          all of them: tests/kernels/triton/machine_code.json

The names are those of `CASES`. Pointers and sizes are divisible by 16, as in a real
layer; otherwise no load would be wide.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton._utils import find_paths_if
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmpress.kernels.triton.configs import GEMV, Config, config
from lmpress.kernels.triton.device.dequantize import dequantize
from lmpress.kernels.triton.device.gemv import gemv
from lmpress.kernels.triton.device.linear import add_up, linear
from lmpress.kernels.triton.device.quantize import quantize
from lmpress.kernels.triton.device.sparse import add_sparse
from lmpress.kernels.triton.device.weight import Format, WeightArgs
from lmpress.kernels.triton.layout import PLANES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {80: "sm_80", 90: "sm_90"}


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its pointers and its constants; the tile may depend on the GPU."""

    kernel: Any
    types: Mapping[str, Any]
    constants: Callable[[int], dict[str, Any]]
    tile: Callable[[int], Config]


def weight(bits: int, zeros: str = "none", group: int = 128, codebook: bool = False) -> dict[str, Any]:
    """Constants of a weight of `bits` bits; `group` 0: one scale per row."""
    width = min(64, group or 64)
    return {"FORMAT": Format(bits, width, 8 // min(PLANES[bits]), group // width, zeros, codebook)}


WEIGHT = {"weight": WeightArgs("*u8", "*u8", "*fp16", "*fp16", "*fp32", *["i32"] * 5)}
PLAIN = Config(0, 0, 4, 3)


def tiled(dtype: str, m: int, bits: int, activations: str = "float", split: int = 8, **options: Any) -> Case:
    def tile(capability: int) -> Config:
        return config(m, activations, bits, bool(options.get("codebook")), capability // 10)

    def constants(capability: int) -> dict[str, Any]:
        own = {"INPUTS": activations, "BLOCK_N": tile(capability).block_n, "BLOCK_M": tile(capability).block_m}
        return weight(bits, **options) | own | {"SPLIT": split}

    inputs = dtype if activations == "float" else "i8"
    types = {"x": f"*{inputs}", "x_scales": "*fp32", **WEIGHT, "y": "*fp32" if split > 1 else f"*{dtype}"}
    return Case(linear, types, constants, tile)


def one_row(dtype: str, bits: int, **options: Any) -> Case:
    constants = weight(bits, **options) | {"BLOCK_N": GEMV.block_n, "SPLIT": 8}
    return Case(gemv, {"x": f"*{dtype}", **WEIGHT, "y": "*fp32"}, lambda _: constants, lambda _: GEMV)


def plain(kernel: Any, types: Mapping[str, Any], **constants: Any) -> Case:
    return Case(kernel, types, lambda _: constants, lambda _: PLAIN)


CASES: dict[str, Case] = {
    "linear w4 fp16 m16": tiled("fp16", 16, 4),
    "linear w4 bf16 m64 asymmetric": tiled("bf16", 64, 4, zeros="integer"),
    "linear w2 bf16 m16": tiled("bf16", 16, 2),
    "linear w3 fp16 m16": tiled("fp16", 16, 3),
    "linear spqr fp16 m16": tiled("fp16", 16, 3, zeros="real", group=16),
    "linear w8 fp16 m16 per row": tiled("fp16", 16, 8, group=0),
    "linear w8 bf16 m32": tiled("bf16", 32, 8),
    "linear nf4 fp16 m16": tiled("fp16", 16, 4, group=64, codebook=True),
    "linear w8a8 m16": tiled("fp16", 16, 8, "token", group=0),
    "linear w8a8 m512": tiled("fp16", 512, 8, "token", split=1, group=0),
    "linear w4a8 m16": tiled("fp16", 16, 4, "group"),
    "linear w4a8 m512": tiled("fp16", 512, 4, "group", split=1),
    "gemv w4 fp16": one_row("fp16", 4),
    "gemv w3 bf16 asymmetric": one_row("bf16", 3, zeros="integer"),
    "gemv spqr fp16": one_row("fp16", 3, zeros="real", group=16),
    "gemv w2 fp16": one_row("fp16", 2),
    "gemv w8 bf16": one_row("bf16", 8),
    "gemv nf4 fp16": one_row("fp16", 4, group=64, codebook=True),
    "dequantize w4 bf16": plain(dequantize, WEIGHT | {"out": "*bf16"}, **weight(4, "integer"), BLOCK_N=32),
    "quantize fp16": plain(quantize, {"x": "*fp16", "codes": "*i8", "scales": "*fp32", "steps": "fp32"}, BLOCK=1024),
    "add_up fp16": plain(add_up, {"partial": "*fp32", "y": "*fp16"}, SPLIT=8, BLOCK=1024),
    "add_sparse fp16": plain(
        add_sparse,
        {"y": "*fp32", "x": "*fp16", "starts": "*i64", "columns": "*i32", "values": "*fp32", "total": "*fp32"},
        BLOCK_M=1,
        BLOCK_E=32,
    ),
}


def facts(case: Case, capability: int) -> dict[str, Any]:
    """Facts about the machine code of `case` for a GPU of `capability`: registers, spills, kinds of instructions."""
    names = case.kernel.arg_names
    constants, tile = case.constants(capability), case.tile(capability)
    signature = {n: "constexpr" if n in constants else case.types.get(n, "i32") for n in names}
    divisible = find_paths_if(
        tuple(signature.values()), lambda path, kind: kind not in ("constexpr", "fp32") and names[path[0]] != "m"
    )
    source = ASTSource(
        case.kernel,
        signature,
        {(names.index(n),): value for n, value in constants.items()},
        {path: [["tt.divisibility", 16]] for path in divisible},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return of_machine_code(compiled.asm["cubin"])


def of_machine_code(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run(TOOLS / "cuobjdump", "-res-usage", file.name)
        listing = run(TOOLS / "nvdisasm", "-c", file.name)
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", listing, re.MULTILINE)
    kinds = Counter(instruction.split(".")[0] for instruction in instructions)
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "instructions": len(instructions),
        "spills": kinds["LDL"] + kinds["STL"],
        "int_to_float": kinds["I2F"] + kinds["I2FP"],
        "matrix": {kind: kinds[kind] for kind in ("HMMA", "HGMMA", "IMMA", "IGMMA") if kinds[kind]},
        "loads": dict(Counter(name for name in instructions if name.startswith(("LDG.", "LDGSTS.")))),
    }


def run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    found = {
        f"{name}, {target}": facts(CASES[name], capability)
        for name in sys.argv[1:] or CASES
        for capability, target in TARGETS.items()
    }
    lines = [
        f"{json.dumps(name)}: {json.dumps(each)}" for name, each in {"triton": triton.__version__, **found}.items()
    ]
    print("{", ",\n".join(lines), "}", sep="\n")

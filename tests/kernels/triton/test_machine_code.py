"""The machine code of the kernels for sm_80 and sm_90, compiled without a GPU, has nothing that would make them slow."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

FOLDER = Path(__file__).parent
TOOLS = [Path(triton.__file__).parent / "backends/nvidia/bin" / name for name in ("ptxas", "cuobjdump", "nvdisasm")]
EXPECTED = json.loads((FOLDER / "machine_code.json").read_text())
CASES = [name for name in EXPECTED if name != "triton"]
PRODUCTS = [name for name in CASES if name.startswith(("linear", "gemv"))]
INT8 = ("linear w8a8", "linear w4a8")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Facts about every case, from another process: in this one, Triton may be interpreting."""
    missing = [str(tool) for tool in TOOLS if not tool.exists()]
    if missing:
        pytest.skip(f"this build of Triton has no assembler for NVIDIA's GPUs: {', '.join(missing)}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, FOLDER / "assemble.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_nothing_spills(found: dict[str, Any], case: str) -> None:
    assert found[case]["spills"] == 0 and found[case]["registers"] <= 255


@pytest.mark.parametrize("case", PRODUCTS)
def test_codes_become_floats_without_conversions(found: dict[str, Any], case: str) -> None:
    """Sums of integers are converted, once per tile; operands are not."""
    if case.startswith(INT8):
        many = 128 * (128 if "w8a8" in case else 64)
        block, threads = (64 * 16, 128) if "m16" in case else (many, 256)
        sums = 1 if "w8a8" in case else 2  # per token, or per group: two parts of a slab
        assert found[case]["int_to_float"] == sums * block // threads
    else:
        assert found[case]["int_to_float"] == 0


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("linear")])
def test_matrix_instructions_multiply(found: dict[str, Any], case: str) -> None:
    kind = ("IMMA", "IGMMA") if case.startswith(INT8) else ("HMMA", "HGMMA")
    assert set(found[case]["matrix"]) == {kind[case.endswith("sm_90")]}


@pytest.mark.parametrize("case", [name for name in PRODUCTS if "spqr" not in name])
def test_weights_are_loaded_16_bytes_at_a_time(found: dict[str, Any], case: str) -> None:
    """Loads are marked evict-first, or copy to shared memory. (Groups of SpQR have 16 columns: a load is at most 4 bytes.)"""
    loads = found[case]["loads"]
    marked = {name for name in loads if ".EF" in name}
    copied = {name for name in loads if name.startswith("LDGSTS")}
    assert marked == {"LDG.E.EF.128"} or (not marked and any(name.endswith(".128") for name in copied))
    if not case.startswith(INT8):  # few rows of int8 inputs are 8 bytes per thread
        assert all(name.endswith(".128") for name in copied)


@pytest.mark.parametrize("case", CASES)
def test_the_machine_code_has_the_recorded_length(found: dict[str, Any], case: str) -> None:
    """If a new Triton makes other code, this fails: look at the code, then regenerate machine_code.json."""
    if triton.__version__ != EXPECTED["triton"]:
        pytest.skip(f"machine_code.json was written with Triton {EXPECTED['triton']}")
    assert abs(found[case]["instructions"] / EXPECTED[case]["instructions"] - 1) <= 0.15
